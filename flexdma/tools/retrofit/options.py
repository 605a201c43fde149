"""The options of `python -m flexdma retrofit`, and those that --quick makes smaller."""

import argparse
import importlib.util
from dataclasses import dataclass

from flexdma.tools import arguments as types
from flexdma.tools.long_context import options as measure
from flexdma.tools.long_context.options import add_measure_arguments, sized_argument
from flexdma.tools.refusal import RefusedError


@dataclass(frozen=True)
class Sizes(measure.Sizes):
    """Sizes of the calibration and of the measurement."""

    tokens: int


SIZES = (
    Sizes(lengths=(1024, 2048), needles=3, stretches=2, rounds=3, tokens=32_768),
    Sizes(lengths=(1024,), needles=3, stretches=2, rounds=1, tokens=8_000),
)
RANK = 16  # of adapters, as in docs/retrofit.md


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", metavar="MODEL", help="hub name, model folder or .gguf file of a decoder")
    parser.add_argument(
        "--text",
        metavar="FILE",
        nargs="+",
        action="extend",
        type=types.input_file,
        default=[],
        help="texts (UTF-8) like those that the model will read: the first three quarters of each calibrate, the last "
        "quarter is measured (default: the documentation in pydoc_data.topics)",
    )
    parser.add_argument(
        "--evaluation-text",
        metavar="FILE",
        nargs="+",
        action="extend",
        type=types.input_file,
        default=[],
        help="further texts that are measured alone, as of another kind",
    )
    parser.add_argument(
        "--out", metavar="DIR", type=types.output_folder, required=True, help="folder for the converted model"
    )
    parser.add_argument(
        "--budget",
        metavar="N",
        type=types.positive_int,
        default=256,
        help="keys per KV head besides the sinks, on average",
    )
    parser.add_argument(
        "--recent",
        metavar="N",
        type=types.natural,
        default=None,
        help="of these, the last tokens, which stay visible whatever their gates (default: a quarter of --budget)",
    )
    parser.add_argument("--sinks", metavar="N", type=types.natural, default=4, help="first tokens that stay visible")
    sized_argument(parser, "--tokens", SIZES, "tokens of calibration", type=types.positive_int)
    parser.add_argument(
        "--sequence", metavar="N", type=types.positive_int, default=4096, help="tokens of a calibration sequence"
    )
    parser.add_argument(
        "--far",
        metavar="N",
        type=types.positive_int,
        default=128,
        help="a gate predicts what queries this many tokens after a key, or more, look at",
    )
    parser.add_argument(
        "--distill",
        metavar="STEPS",
        type=types.natural,
        default=0,
        help="steps of training adapters, or gates, to the full model, each on one sequence; 0 = none",
    )
    parser.add_argument(
        "--lora",
        metavar="RANK",
        type=types.natural,
        default=None,
        help=f"of the adapters that --distill trains (needs peft; default: {RANK}); 0 = train gates instead",
    )
    parser.add_argument("--seed", metavar="N", type=types.seed, default=0, help="of calibration sequences and needles")
    add_measure_arguments(parser, SIZES)
    parser.add_argument(
        "--no-evaluate", dest="evaluate", action="store_false", help="measure nothing; --resume can do it later"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from what an interrupted run left in DIR")
    existing.add_argument("--overwrite", action="store_true", help="replace the DIR of an earlier run")
    parser.add_argument(
        "--dtype", choices=types.DTYPES, default="bfloat16", help="of the weights that are read, saved and measured"
    )


def resolved(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments with every default filled in, and `window`, which is the rest of the budget.

    Raises RefusedError for a budget without such a rest.
    """
    options = measure.resolved(arguments, SIZES)
    if options.recent is None:
        options.recent = options.budget // 4
    if options.recent >= options.budget:
        raise RefusedError(f"--recent: expected less than --budget, which is {options.budget}, got {options.recent}")
    if options.lora and not options.distill:
        raise RefusedError(f"--lora: expected --distill beside it, got {options.lora}")
    if options.lora is None:
        options.lora = RANK if options.distill else 0
    if options.lora and importlib.util.find_spec("peft") is None:
        raise RefusedError("--distill: needs peft: pip install peft, or --lora 0")
    options.window = options.budget - options.recent
    return options
