"""python -m flexdma demo: train the four models, print the table, write the pictures."""

import argparse

from flexdma.tools.demo.settings import add_arguments, resolved
from flexdma.tools.demo.text import TextError, load_text
from flexdma.tools.machine import cpp_compiler
from flexdma.tools.refusal import RefusedError, check_installed, refusing

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Check the request, then run the demonstration."""
    options = resolved(arguments)
    check_installed("matplotlib", "rich", extra="demo")
    with refusing(TextError):
        text = load_text(options.text, options.context)
    # On a CPU torch.compile generates C++.
    if not options.no_compile and options.device.startswith("cpu") and cpp_compiler() is None:
        raise RefusedError("needs a C++ compiler for torch.compile (for example: apt-get install g++), or --no-compile")
    options.out.mkdir(parents=True, exist_ok=True)

    # Imported here, because it needs matplotlib and rich.
    from flexdma.tools.demo.comparison import compare

    compare(options, text)
    return 0
