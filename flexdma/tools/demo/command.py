"""python -m flexdma demo: train the four models, print the table, write the pictures."""

import argparse

from flexdma.tools.demo.settings import add_arguments, resolved
from flexdma.tools.demo.text import TextError, load_text
from flexdma.tools.refusal import RefusedError, check_installed, refusing

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Check everything that can be checked before the work, then do it."""
    options = resolved(arguments)
    check_installed("matplotlib", "rich", extra="demo")
    with refusing(TextError):
        text = load_text(options.text, options.context)
    problem = _compiler_problem(options)
    if problem is not None:
        raise RefusedError(problem)
    options.out.mkdir(parents=True, exist_ok=True)

    # Only now: it imports matplotlib and rich.
    from flexdma.tools.demo.comparison import compare

    compare(options, text)
    return 0


def _compiler_problem(options: argparse.Namespace) -> str | None:
    """On a CPU torch.compile generates C++ and needs a compiler for it."""
    if options.no_compile or not options.device.startswith("cpu"):
        return None
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler:
        return "needs a C++ compiler for torch.compile (for example: apt-get install g++), or --no-compile"
    return None
