"""python -m flexdma bench: measure, print the tables, and write them where asked."""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flexdma.bench import cases, report
from flexdma.bench.timing import interleaved, peak_bytes
from flexdma.lowerings.flex import BLOCK_SIZE
from flexdma.whole_files import write_whole

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PACKING = {"quick": (8192, 256)}  # else the size the targets are stated for
CANNOT = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--suite", choices=sorted(cases.SUITES), default="cpu", help="what is measured")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; medians are taken over them")
    parser.add_argument(
        "--dtype", choices=sorted(DTYPES), default=None, help="default float32, bfloat16 for --suite gpu"
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default what PyTorch takes")
    parser.add_argument("--out", type=Path, default=None, help="folder for bench-SUITE.json and bench-SUITE.md")


def run(arguments: argparse.Namespace) -> int:
    """Measure the suite."""
    device = "cuda" if arguments.suite == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return _cannot("--suite gpu: expected a CUDA device, found none")
    if arguments.rounds < 1:
        return _cannot(f"--rounds: expected at least 1, got {arguments.rounds}")
    if importlib.util.find_spec("rich") is None:
        return _cannot("needs rich: pip install flexdma[bench]")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    torch._dynamo.config.recompile_limit = 64  # one shape after another through the same code
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device == "cuda" else "float32")]

    results = measured(arguments.suite, arguments.rounds, device, dtype)
    text = report.markdown(results)
    print(text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for suffix, content in (("json", json.dumps(results, indent=1) + "\n"), ("md", text)):
            write_whole(arguments.out / f"bench-{arguments.suite}.{suffix}", partial(Path.write_text, data=content))
    return 0


def measured(suite: str, rounds: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Everything of a suite, with a progress bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    shapes = cases.SUITES[suite]
    results: dict[str, Any] = {
        "machine": report.machine(device), "suite": suite, "dtype": str(dtype).removeprefix("torch."), "rounds": rounds,
        "heads": f"Hq={shapes[0].query_heads} Hkv={shapes[0].heads} D={shapes[0].size}, iid gates",
        "calls": [], "stages": [], "packing": [], "memory": [],
    }  # fmt: skip
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(suite, total=None)

        def ticker(what: str) -> Callable[[str], None]:
            progress.update(task, description=what)
            return lambda name: progress.update(task, description=f"{what}: {name}")

        for shape in shapes:
            tensors = cases.inputs(shape, device, dtype)
            seconds = interleaved(cases.contenders(shape, tensors), rounds, ticker(str(shape)))
            results["calls"].append({"shape": str(shape), "seconds": seconds})
        staged = shapes[0]
        seconds = interleaved(cases.stages(staged, cases.inputs(staged, device, dtype)), rounds, ticker("stages"))
        results["stages"].append({"shape": str(staged), "seconds": seconds})

        group = staged.query_heads // staged.heads
        length, window = PACKING.get(suite, (32768, 1024))
        for rows, keys, where in (
            (128, 128, "blocks of 128 x 128"),
            (BLOCK_SIZE["cpu"][0] // group, BLOCK_SIZE["cpu"][1], ""),
        ):
            progress.update(task, description="packing")
            tile = where or f"the CPU kernel's tiles of {rows} positions x {keys} keys"
            ratios = cases.packing_ratios(length, window, rows, keys)
            results["packing"].append({"length": length, "window": window, "tile": tile, "ratios": ratios})
        for shape in {(s.length, s.window): s for s in shapes if not s.backward}.values():
            progress.update(task, description="memory")
            gate = cases.inputs(shape, device, dtype)[3].detach()
            for lowering, build in cases.mask_memory(shape, gate).items():
                dense = shape.query_heads * shape.length**2
                entry = {"shape": str(shape), "lowering": lowering, "bytes": peak_bytes(build), "dense": dense}
                results["memory"].append(entry)
    return results


def _cannot(reason: str) -> int:
    print(f"python -m flexdma bench: {reason}", file=sys.stderr)
    return CANNOT
