"""The options of the demonstration and their defaults."""

import argparse
from dataclasses import dataclass

from flexdma.tools import arguments as types
from flexdma.tools.byte_models.attentions import RECENCIES


@dataclass(frozen=True)
class Defaults:
    """Defaults of the options that --quick makes smaller."""

    steps: int
    context: int
    window: int
    stretch: int  # bytes of validation text in the pictures of blocks and lifetimes
    sample: int  # bytes of generated text


FULL_RUN = Defaults(steps=400, context=512, window=64, stretch=4096, sample=400)
QUICK_RUN = Defaults(steps=60, context=256, window=32, stretch=2048, sample=200)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m flexdma demo`."""

    def default(name: str) -> str:
        return f"default: {getattr(FULL_RUN, name)}; with --quick {getattr(QUICK_RUN, name)}"

    # These have two defaults each, so the help text contains them.
    def sized(flag: str, name: str, meaning: str) -> None:
        parser.add_argument(
            flag, type=types.positive_int, metavar="N", default=argparse.SUPPRESS, help=f"{meaning} ({default(name)})"
        )

    parser.add_argument("--quick", action="store_true", help="a smaller run, to check that everything works")
    parser.add_argument(
        "--text", metavar="FILE", help="training text, any bytes (default: the documentation in pydoc_data.topics)"
    )
    parser.add_argument(
        "--out",
        type=types.output_folder,
        metavar="DIR",
        default="demo-report",
        help="folder for pictures and results.json (default: %(default)s)",
    )
    parser.add_argument(
        "--recency",
        choices=RECENCIES,
        default="slope",
        help="how the gate of the second model prefers recent keys (default: %(default)s)",
    )
    sized("--steps", "steps", "training steps of each model")
    sized("--context", "context", "bytes per training sequence")
    sized("--window", "window", "w: keys that a query sees")
    parser.add_argument(
        "--seed", type=types.seed, metavar="N", default=0, help="of weights, batches and sample (default: %(default)s)"
    )
    parser.add_argument(
        "--device", type=types.device(), default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="train without torch.compile, which starts at once and runs slower"
    )
    _add_several_processes(
        parser.add_argument_group(
            "several processes",
            "torchrun --nproc-per-node N -m flexdma demo ... trains the second model alone over N processes, the product of "
            "--fsdp, --context-parallel and --tensor-parallel",
        )
    )


def _add_several_processes(group: argparse._ArgumentGroup) -> None:
    def divided(flag: str, meaning: str) -> None:
        group.add_argument(flag, type=types.positive_int, metavar="N", default=1, help=f"{meaning} (default: 1)")

    divided("--fsdp", "parts of a batch, and of every parameter")
    divided("--context-parallel", "parts of each sequence")
    divided("--tensor-parallel", "parts of the heads of each layer")
    group.add_argument(
        "--save-every",
        type=types.positive_int,
        metavar="N",
        default=100,
        help="steps between checkpoints in DIR/training (default: %(default)s)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in DIR/training, if there is one; without this option it is deleted",
    )
    group.add_argument(
        "--timeout",
        type=types.positive_number,
        metavar="S",
        default=600.0,
        help="seconds that a process waits for others before it ends with an error (default: %(default)s)",
    )
    group.add_argument(
        "--deterministic", action="store_true", help="use deterministic algorithms alone, on a GPU slower"
    )


def resolved(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments with every default filled in."""
    defaults = QUICK_RUN if arguments.quick else FULL_RUN
    return argparse.Namespace(**{**vars(defaults), **vars(arguments)})
