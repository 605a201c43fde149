"""python -m flexdma demo: train the four models, print the table, write the pictures; or one model over several processes."""

import argparse

from flexdma.tools.byte_models.text import TextError, load_text
from flexdma.tools.demo.ranks import check_division, is_divided
from flexdma.tools.demo.settings import add_arguments, resolved
from flexdma.tools.machine import cpp_compiler
from flexdma.tools.refusal import RefusedError, check_installed, refusing

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Check the request, then run the demonstration."""
    options = resolved(arguments)
    check_installed("matplotlib", "rich", extra="demo")
    divided = is_divided(options)
    if divided:
        check_division(options)
    elif options.resume:
        raise RefusedError(
            "--resume: expected torchrun --nproc-per-node N -m flexdma demo ..., got one process without it"
        )
    with refusing(TextError):
        text = load_text(options.text, options.context)
    # On a CPU torch.compile generates C++.
    if not options.no_compile and options.device.startswith("cpu") and cpp_compiler() is None:
        raise RefusedError("needs a C++ compiler for torch.compile (for example: apt-get install g++), or --no-compile")
    options.out.mkdir(parents=True, exist_ok=True)

    # Imported here, because these need matplotlib and rich.
    if divided:
        from flexdma.tools.demo.divided import train_divided

        train_divided(options, text)
        return 0
    from flexdma.tools.demo.comparison import compare

    compare(options, text)
    return 0
