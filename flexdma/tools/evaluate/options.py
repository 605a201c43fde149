"""The options of `python -m flexdma evaluate`, and those that --quick makes smaller."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from flexdma.tools import arguments as types
from flexdma.tools.evaluate.presses import PRESSES
from flexdma.tools.long_context.needles import KINDS


@dataclass(frozen=True)
class Defaults:
    """Defaults that --quick makes smaller."""

    lengths: tuple[int, ...]
    needles: int
    stretches: int
    rounds: int


FULL_RUN = Defaults(lengths=(1024, 2048, 4096), needles=3, stretches=2, rounds=3)
QUICK_RUN = Defaults(lengths=(1024,), needles=1, stretches=1, rounds=1)
BUDGET = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""

    def sized(flag: str, of: object, meaning: str, **more: object) -> None:
        name = flag.removeprefix("--")
        full, quick = (getattr(run, name) for run in (FULL_RUN, QUICK_RUN))
        shown = [" ".join(map(str, value)) if isinstance(value, tuple) else value for value in (full, quick)]
        text = f"{meaning} (default: {shown[0]}; with --quick {shown[1]})"
        parser.add_argument(flag, type=of, metavar="N", default=argparse.SUPPRESS, help=text, **more)  # type: ignore[arg-type]

    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="*",
        help="hub name, model folder or .gguf file; the first is also measured with full attention and with sinks + window, "
        "and every one that flexdma has converted as it is",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        nargs="+",
        type=types.input_file,
        default=[],
        help="texts (UTF-8) that no model was fitted to (default: the documentation in pydoc_data.topics)",
    )
    parser.add_argument(
        "--budget",
        metavar="N",
        type=types.positive_int,
        default=None,
        help=f"keys per KV head besides the sinks (default: as many as the converted models keep, else {BUDGET})",
    )
    parser.add_argument("--sinks", metavar="N", type=types.natural, default=4, help="first tokens that stay visible")
    sized("--lengths", types.positive_int, "tokens of the contexts", nargs="+")
    sized("--needles", types.natural, "depths at which needles of each kind, length and seed are hidden")
    sized("--stretches", types.positive_int, "stretches of each text whose likelihood is measured")
    sized("--rounds", types.natural, "timed rounds; 0 = no timing")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of needles (default: all)"
    )
    parser.add_argument("--seed", metavar="N", nargs="+", type=types.seed, default=[0], help="seeds of the needles")
    parser.add_argument(
        "--presses",
        nargs="+",
        choices=PRESSES,
        default=None,
        help="presses of NVIDIA kvpress (default: all where it is installed)",
    )
    parser.add_argument("--quick", action="store_true", help="a smaller run, to check that everything works")
    parser.add_argument(
        "--join",
        metavar="FILE",
        nargs="+",
        type=types.input_file,
        default=None,
        help="measure nothing: make one page of the evaluation.json of several runs, as with two versions of transformers",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=types.output_folder, default=Path("evaluation"), help="folder for JSON and page"
    )
    parser.add_argument("--dtype", choices=types.DTYPES, default="float32", help="of the weights")
    parser.add_argument("--device", type=types.device("cpu", "cuda"), default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--threads", metavar="N", type=types.positive_int, default=None, help="CPU threads (default: PyTorch's)"
    )


def resolved(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments with every default filled in."""
    return argparse.Namespace(**{**vars(QUICK_RUN if arguments.quick else FULL_RUN), **vars(arguments)})
