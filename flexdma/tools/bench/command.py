"""python -m flexdma bench: measure a suite, or read its results from a file; print tables, write pictures and pages."""

import argparse
import os
from functools import partial
from pathlib import Path

import torch

from flexdma.atomic_write import atomic_write
from flexdma.tools import arguments as types
from flexdma.tools.bench import report
from flexdma.tools.bench.ahead import compile_ahead
from flexdma.tools.bench.processes import measure_all
from flexdma.tools.bench.sections import Setting, begun, planned
from flexdma.tools.bench.suites import DTYPES, SUITES
from flexdma.tools.budget import SHARE, Budget
from flexdma.tools.marks import between
from flexdma.tools.records import Results
from flexdma.tools.refusal import RefusedError, check_installed, refusing
from flexdma.tools.timing import Turns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add, number, share = parser.add_argument, types.positive_int, f"1/{1 / SHARE:g}"
    add("--suite", choices=sorted(SUITES), default="cpu", help="cases to measure")
    add("--rounds", type=number, default=5, help="interleaved rounds; the tables have their medians")
    add("--dtype", choices=sorted(types.DTYPES), default=None, help="default: the suite's")
    add("--threads", type=number, default=None, help="CPU threads; default: PyTorch's")
    seconds = f"seconds for measuring, of which one contender of a case may use {share}; default: the suite's"
    add("--budget", type=types.positive_number, default=None, help=seconds)
    ahead = "first run every case once in N processes at a time, for no longer than the budget, so that kernels are compiled"
    add("--ahead", type=number, default=None, metavar="N", help=f"{ahead}; default: no")
    add("--out", type=types.output_folder, default=None, help="folder for bench-SUITE.json and bench-SUITE.md")
    source = "a bench-SUITE.json to read instead of measuring"
    add("--from", dest="source", type=types.bench_results, default=None, help=source)
    tables = "a page in which to replace the tables between the suite's marks"
    add("--markdown", type=types.input_file, default=None, help=tables)
    add("--plot", type=types.picture, default=None, help="file for a picture of time against N and w (png, svg)")


def run(arguments: argparse.Namespace) -> int:
    """Measure the suite or read its results, print the tables, and write the requested files."""
    with refusing(ValueError, OSError):
        if arguments.markdown:  # refuse a page without marks before measuring for minutes
            suite = arguments.source.about["suite"] if arguments.source else arguments.suite
            between(arguments.markdown.read_text(), f"bench {suite}", "")
        results = arguments.source or _measured(arguments)
        _write(results, arguments)
    return 0


def _write(results: Results, arguments: argparse.Namespace) -> None:
    text = report.markdown(results)
    print(text)
    if arguments.markdown:
        page = between(arguments.markdown.read_text(), f"bench {results.about['suite']}", text)
        atomic_write(arguments.markdown, partial(Path.write_text, data=page))
    if arguments.plot:
        from flexdma.plots import scaling_figure

        atomic_write(arguments.plot, scaling_figure(results.as_dict()).savefig)


def _measured(arguments: argparse.Namespace) -> Results:
    """Measure the suite.  The results are saved after each case, and printed where Ctrl-C ends the run."""
    suite = SUITES[arguments.suite]
    device = suite.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if suite.device == "cuda" and not torch.cuda.is_available():
        raise RefusedError(f"--suite {arguments.suite}: expected a CUDA device, found none")
    check_installed("rich", extra="bench")
    if suite.decoding:
        check_installed("transformers", extra="transformers")
    from flexdma.tools.progress import progress_bars

    if arguments.plot and not (suite.lengths or suite.windows):
        raise RefusedError(f"--plot: expected a suite that measures several lengths or windows, got {arguments.suite}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)  # so that `machine` records it
    # Python warns about resources of a killed process, although it removes them.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")
    dtype = arguments.dtype or suite.dtype or DTYPES[device]
    setting = Setting(device, types.DTYPES[dtype], arguments.threads)
    results = begun(suite, arguments.suite, arguments.rounds, setting)
    seconds = suite.budget if arguments.budget is None else arguments.budget
    cases = list(planned(suite, device))
    if arguments.ahead is not None:
        # Each of the processes would otherwise start as many compilers as there are cores.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.ahead)))
        with progress_bars(transient=True) as bars:
            task = bars.add_task("compiling", total=len(cases), note="")
            compile_ahead(
                cases, setting, Budget(seconds), arguments.ahead,
                lambda case, done, of: bars.update(task, note=case, completed=done),
            )  # fmt: skip
    turns = Turns(arguments.rounds, budget=Budget(seconds))
    try:
        with progress_bars(transient=True) as bars:
            task = bars.add_task(arguments.suite, total=None, note="")

            def show(case: str, contender: str, done: int, of: int) -> None:
                what = f"{case}: {contender}".removesuffix(": ")
                bars.update(task, note=what, completed=done, total=of)

            measure_all(cases, results, setting, turns, save=partial(_save, arguments.out), progress=show)
    except KeyboardInterrupt:
        print(report.markdown(results))
        raise
    return results


def _save(folder: Path | None, results: Results) -> None:
    """Write JSON and Markdown, each atomically."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, content in (("json", results.to_json()), ("md", report.markdown(results))):
        path = folder / f"bench-{results.about['suite']}.{suffix}"
        atomic_write(path, partial(Path.write_text, data=content))
