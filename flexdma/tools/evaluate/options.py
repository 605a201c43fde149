"""The options of `python -m flexdma evaluate`, and those that --quick makes smaller."""

import argparse
from pathlib import Path

from flexdma.tools import arguments as types
from flexdma.tools.evaluate.presses import PRESSES
from flexdma.tools.long_context.options import Sizes, add_measure_arguments

SIZES = (
    Sizes(lengths=(1024, 2048, 4096), needles=3, stretches=2, rounds=3),
    Sizes(lengths=(1024,), needles=1, stretches=1, rounds=1),
)
BUDGET = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
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
    add_measure_arguments(parser, SIZES)
    parser.add_argument("--seed", metavar="N", nargs="+", type=types.seed, default=[0], help="seeds of the needles")
    parser.add_argument(
        "--presses",
        nargs="+",
        choices=PRESSES,
        default=None,
        help="presses of NVIDIA kvpress (default: all where it is installed)",
    )
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
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the records in --out: measure what an interrupted run has not, or further models",
    )
    parser.add_argument("--dtype", choices=types.DTYPES, default="float32", help="of the weights")
