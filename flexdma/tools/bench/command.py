"""python -m flexdma bench: measure a suite and print its tables, or print those of a file; figures and pages from either."""

import argparse
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flexdma.atomic_write import atomic_write
from flexdma.tools.bench import measure, report
from flexdma.tools.bench.limits import SHARE, Budget
from flexdma.tools.bench.suites import SUITES
from flexdma.tools.bench.worker import measure_apart
from flexdma.tools.refusal import refusing

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--suite", choices=sorted(SUITES), default="cpu", help="what is measured")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; medians are taken over them")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default=None, help="default the suite's own")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default what PyTorch takes")
    parser.add_argument(
        "--budget",
        type=float,
        default=None,
        help=f"seconds that measuring may take, and one contender of a case 1/{1 / SHARE:g} of them; default the suite's own",
    )
    parser.add_argument("--out", type=Path, default=None, help="folder for bench-SUITE.json and bench-SUITE.md")
    parser.add_argument("--from", dest="source", type=Path, default=None, help="a bench-SUITE.json: measure nothing")
    parser.add_argument(
        "--markdown", type=Path, default=None, help="a page in which the tables between the suite's marks are replaced"
    )
    parser.add_argument("--plot", type=Path, default=None, help="a picture of time against N and against w (png, svg)")


def run(arguments: argparse.Namespace) -> int:
    """Measure the suite, or read what was measured, and write what is asked for."""
    with refusing(ValueError, OSError, ImportError):
        results = _read(arguments.source) if arguments.source else _measured(arguments)
        _write(results, arguments)
    return 0


def _write(results: dict[str, Any], arguments: argparse.Namespace) -> None:
    text = report.markdown(results)
    print(text)
    if arguments.markdown:
        page = report.between(arguments.markdown.read_text(), results["suite"], text)
        atomic_write(arguments.markdown, partial(Path.write_text, data=page))
    if arguments.plot:
        from flexdma.plots import scaling_figure

        atomic_write(arguments.plot, scaling_figure(results).savefig)


def _read(path: Path) -> dict[str, Any]:
    try:
        results = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--from: expected JSON that this command wrote, got {path}: {error}") from error
    if not isinstance(results, dict) or not {"machine", "calls"} <= results.keys():
        raise ValueError(f"--from: expected results of this version of the command, got {path}")
    return results


def _measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything of the suite.  What is done is on disk after each case, and returned when interrupted is printed."""
    suite = SUITES[arguments.suite]
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--suite {arguments.suite}: expected a CUDA device, found none")
    for name in ("rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: expected at least 1, got {value}")
    if arguments.budget is not None and arguments.budget <= 0:
        raise ValueError(f"--budget: expected more than 0, got {arguments.budget}")
    for module, needed in (("rich", True), ("matplotlib", arguments.plot is not None)):
        if needed and importlib.util.find_spec(module) is None:
            raise ImportError(f"needs {module}: pip install flexdma[bench]")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which measures memory, prints two lines each time
    dtype = arguments.dtype or suite.dtype
    results = measure.begun(suite, arguments.suite, arguments.rounds, dtype, suite.device)
    budget = Budget(suite.budget if arguments.budget is None else arguments.budget)
    options = {"rounds": arguments.rounds, "dtype": DTYPES[dtype], "device": suite.device, "budget": budget}
    measure_all = measure_apart if suite.device == "cuda" else measure.measure
    try:
        with _progress(arguments.suite) as progress:
            measure_all(suite, results, **options, save=partial(_save, arguments.out), progress=progress)
    except KeyboardInterrupt:
        print(report.markdown(results))
        raise
    return results


def _save(folder: Path | None, results: dict[str, Any]) -> None:
    """JSON and Markdown, whole at every moment."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    for suffix, content in (("json", text), ("md", report.markdown(results))):
        atomic_write(folder / f"bench-{results['suite']}.{suffix}", partial(Path.write_text, data=content))


@contextmanager
def _progress(suite: str) -> Iterator[measure.Progress]:
    """A bar on standard error: which case and contender runs, and how many cases are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(suite, total=None)
        yield lambda case, contender, done, of: bars.update(
            task, description=f"{case}: {contender}".removesuffix(": "), completed=done, total=of
        )
