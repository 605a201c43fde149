"""python -m flexdma longrun: read a million tokens in constant memory, then decode at constant cost."""

import argparse
import importlib.util
import json
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from flexdma import DynamicMaskAttention
from flexdma.atomic_write import atomic_write
from flexdma.checks import LARGEST
from flexdma.gates import RECENCIES
from flexdma.tools.longrun import report
from flexdma.tools.longrun.measure import Measurements, Sizes, make_layer, measure
from flexdma.tools.machine import machine
from flexdma.tools.refusal import RefusedError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    for name, default, text in (
        ("tokens", 1_000_000, "how many to read before decoding"),
        ("chunk", 16384, "tokens read at a time; memory is O(window + chunk)"),
        ("decode", 1000, "tokens to decode, from the last state and from that after 4,096 tokens in turns"),
        ("window", 1024, "keys that each query keeps"),
        ("heads", 8, "query heads"),
        ("kv-heads", 2, "key/value heads"),
        ("head-dim", 64, "size of a head"),
        ("hidden-size", 512, "of the layer's input, which is random"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    recencies = [recency for recency in RECENCIES if recency is not None]
    parser.add_argument("--recency", choices=recencies, default=None, help="of the gates; default none")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default what PyTorch takes")
    parser.add_argument("--json", type=Path, default=None, help="file for all numbers")
    parser.add_argument("--plot", type=Path, default=None, help="file for a picture (.png, .svg, ...)")


def run(arguments: argparse.Namespace) -> int:
    """Check, run, print, and write what was asked for."""
    problem = _problem(arguments)
    if problem is not None:
        raise RefusedError(problem)
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


def _problem(arguments: argparse.Namespace) -> str | None:
    """What keeps the run from being made or from being written, before it takes its minutes."""
    for name in ("tokens", "chunk", "window", "heads", "kv_heads", "head_dim", "hidden_size", "threads"):
        number, option = getattr(arguments, name), f"--{name.replace('_', '-')}"
        if number is not None and number < 1:
            return f"{option}: expected at least 1, got {number}"
        if number is not None and number > LARGEST:
            return f"{option}: expected at most {LARGEST}, got {number}"
    if arguments.decode < 0:
        return f"--decode: expected at least 0, got {arguments.decode}"
    if not 0 <= arguments.seed < 2**63:
        return f"--seed: expected 0 to 2^63 - 1, got {arguments.seed}"
    if arguments.heads % arguments.kv_heads:
        return f"--heads: expected a multiple of --kv-heads {arguments.kv_heads}, got {arguments.heads}"
    if re.fullmatch(r"cpu|cuda(:\d+)?", arguments.device) is None:
        return f"--device: expected cpu or cuda, got {arguments.device}"
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        return f"--device: expected a CUDA device for {arguments.device}, found none"
    needed = ["rich"] + ["matplotlib"] * (arguments.plot is not None)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs {' and '.join(missing)}: pip install flexdma[bench]"
    for name in ("json", "plot"):
        path = getattr(arguments, name)
        if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
            return f"--{name}: expected a file in a folder that exists, got {path}"
    if arguments.plot is not None and arguments.plot.suffix[1:] not in report.picture_formats():
        return f"--plot: expected a file name that ends in one of {', '.join(report.picture_formats())}, got {arguments.plot}"
    return None
