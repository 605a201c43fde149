"""python -m flexdma longrun: read a million tokens in constant memory, then decode at constant cost."""

import argparse
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from flexdma import DynamicMaskAttention
from flexdma.atomic_write import atomic_write
from flexdma.gates import RECENCIES
from flexdma.tools import arguments as types
from flexdma.tools.longrun import report
from flexdma.tools.longrun.measure import Measurements, Sizes, make_layer, measure
from flexdma.tools.machine import machine
from flexdma.tools.refusal import check_installed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    for name, default, text in (
        ("tokens", 1_000_000, "tokens to read before decoding"),
        ("chunk", 16384, "tokens read at a time; memory is O(window + chunk)"),
        ("decode", 1000, "tokens to decode, in turns from the last state and from that after 4,096 tokens"),
        ("window", 1024, "keys that each query keeps"),
        ("heads", 8, "query heads"),
        ("kv-heads", 2, "key/value heads"),
        ("head-dim", 64, "size of a head"),
        ("hidden-size", 512, "of the layer's input, which is random"),
    ):
        of = types.natural if name == "decode" else types.positive_int
        parser.add_argument(f"--{name}", type=of, default=default, help=text)
    recencies = [recency for recency in RECENCIES if recency is not None]
    parser.add_argument("--recency", choices=recencies, default=None, help="recency of the gates; default: none")
    parser.add_argument("--seed", type=types.seed, default=0, help="of weights and tokens")
    parser.add_argument("--device", type=types.device("cpu", "cuda"), default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=types.positive_int, default=None, help="CPU threads; default: PyTorch's")
    parser.add_argument("--json", type=types.output_file, default=None, help="file for all numbers")
    parser.add_argument("--plot", type=types.picture, default=None, help="file for a picture (.png, .svg, ...)")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table, and write the requested files."""
    types.check_multiple(arguments, "heads", "kv_heads")
    check_installed("rich", extra="bench")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    sizes = Sizes(**{name: getattr(arguments, name) for name in Sizes.__dataclass_fields__})
    layer = make_layer(sizes, arguments.device)
    measured = _with_progress(layer, sizes)
    about = machine(arguments.device)
    print(", ".join(f"{name} {value}" for name, value in (about | asdict(sizes)).items() if value is not None) + "\n")
    print(report.table(measured))
    if arguments.json is not None:
        numbers = json.dumps({"machine": about, "sizes": asdict(sizes), **measured.numbers()}, indent=1) + "\n"
        atomic_write(arguments.json, partial(Path.write_text, data=numbers))
    if arguments.plot is not None:
        report.write_plot(arguments.plot, measured)
    return 0


def _with_progress(layer: DynamicMaskAttention, sizes: Sizes) -> Measurements:
    from flexdma.tools.progress import progress_bars

    with progress_bars(transient=True) as bars:
        tasks = {
            "prefill": bars.add_task("prefill", total=sizes.tokens, note=""),
            "decode": bars.add_task("decode", total=sizes.decode, note=""),
        }
        return measure(layer, sizes, lambda what, done: bars.update(tasks[what], completed=done))
