"""python -m flexdma demo: train the four models, print the table, write the pictures."""

import argparse
import importlib.util
from pathlib import Path

from flexdma.tools.demo.settings import add_arguments, device_problem, resolved
from flexdma.tools.demo.text import TextError, load_text
from flexdma.tools.refusal import RefusedError, refusing

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Check everything that can be checked before the work, then do it."""
    options = resolved(arguments)
    missing = [name for name in ("matplotlib", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        raise RefusedError(f"needs {' and '.join(missing)}: pip install flexdma[demo]")
    with refusing(TextError):
        text = load_text(options.text, options.context)
    problem = device_problem(options.device) or _folder_problem(Path(options.out)) or _compiler_problem(options)
    if problem is not None:
        raise RefusedError(problem)

    # Only now: it imports matplotlib and rich.
    from flexdma.tools.demo.comparison import compare

    compare(options, text)
    return 0


def _folder_problem(out: Path) -> str | None:
    """Creates the folder, so that a run of minutes does not end in an error."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"--out: expected a folder that can be written, got {out} ({error.strerror})"
    return None


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
