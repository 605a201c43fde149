"""The options of commands that measure language models, with other defaults for --quick."""

import argparse
from dataclasses import dataclass
from typing import Any

from flexdma.tools import arguments as types
from flexdma.tools.long_context.needles import KINDS


@dataclass(frozen=True)
class Sizes:
    """Sizes of a measurement, as in `Plan`."""

    lengths: tuple[int, ...]
    needles: int
    stretches: int
    rounds: int


def sized_argument(
    parser: argparse.ArgumentParser, flag: str, sizes: tuple[Any, Any], meaning: str, **more: Any
) -> None:
    """Add an option whose default is a field of the first of `sizes`, and with --quick of the second."""
    name = flag.removeprefix("--").replace("-", "_")
    shown = [" ".join(map(str, value)) if isinstance(value, tuple) else value
             for value in (getattr(size, name) for size in sizes)]  # fmt: skip
    text = f"{meaning} (default: {shown[0]}; with --quick {shown[1]})"
    parser.add_argument(flag, metavar="N", default=argparse.SUPPRESS, help=text, **more)


def add_measure_arguments(parser: argparse.ArgumentParser, sizes: tuple[Sizes, Sizes]) -> None:
    """The options of what is measured and where.  sizes: the defaults, and those with --quick."""
    sized_argument(parser, "--lengths", sizes, "tokens of the contexts", type=types.positive_int, nargs="+")
    sized_argument(
        parser,
        "--needles",
        sizes,
        "depths at which needles of each kind, length and seed are hidden",
        type=types.natural,
    )
    sized_argument(
        parser, "--stretches", sizes, "stretches of each text whose likelihood is measured", type=types.positive_int
    )
    sized_argument(parser, "--rounds", sizes, "timed rounds; 0 = no timing", type=types.natural)
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of needles (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="a smaller run, to check that everything works")
    parser.add_argument("--device", type=types.device("cpu", "cuda"), default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--threads", metavar="N", type=types.positive_int, default=None, help="CPU threads (default: PyTorch's)"
    )


def resolved(arguments: argparse.Namespace, sizes: tuple[Sizes, Sizes]) -> argparse.Namespace:
    """The arguments with every default filled in."""
    return argparse.Namespace(**{**vars(sizes[arguments.quick]), **vars(arguments)})
