"""python -m flexdma experiments: the options, and one experiment from training to report."""

import argparse
import os
from dataclasses import replace
from typing import Any

from flexdma.tools import arguments as types
from flexdma.tools.experiments.mixers import MIXERS, needed, not_installed
from flexdma.tools.experiments.presets import PRESETS, Setting
from flexdma.tools.machine import machine
from flexdma.tools.refusal import RefusedError, check_installed

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m flexdma experiments`."""
    parser.add_argument(
        "task", choices=list(PRESETS["cpu"]),
        help="stacked, unstacked, overwritten: recall of pairs among noise; copying: tokens among noise, in order",
    )  # fmt: skip
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="cpu",
        help="sizes for two CPU cores, one GPU, or as in the papers (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--mixers", type=types.one_of(list(MIXERS)), nargs="+", metavar="MIXER", default=argparse.SUPPRESS,
        help=f"of {', '.join(MIXERS)} (default: all that are installed)",
    )  # fmt: skip
    parser.add_argument(
        "--rates", type=types.positive_number, nargs="+", metavar="RATE", default=argparse.SUPPRESS,
        help="learning rates; the best of each mixer counts (default: the preset's)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=types.seed, nargs="+", metavar="N", default=argparse.SUPPRESS,
        help="of weights and batches (default: the preset's)",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=types.positive_int, metavar="N", default=None, help="training steps (default: the preset's)"
    )
    parser.add_argument(
        "--out", type=types.output_folder, metavar="DIR", default="experiments",
        help="folder for runs, table and picture; a second call trains the runs that are missing (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", type=types.device(), default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument(
        "--workers", type=types.positive_int, metavar="N", default=None,
        help="processes of one thread each (default: one per CPU core; 1 on a GPU)",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Train what is missing, print the table, write JSON, table and picture."""
    check_installed("matplotlib", "rich", extra="experiments")
    # Imported here, because these need matplotlib and rich.
    from rich.console import Console

    from flexdma.tools.experiments import grid, report
    from flexdma.tools.progress import progress_bars

    setting = _chosen(arguments)
    name = f"{arguments.task}-{arguments.preset}"
    folder = arguments.out / name
    workers = arguments.workers or (len(os.sched_getaffinity(0)) if arguments.device == "cpu" else 1)
    done, total = grid.finished(setting, folder), len(grid.runs_of(setting))
    with progress_bars() as bars:
        task = bars.add_task(name, total=total, completed=len(done), note="")

        def watch(run: grid.Run, outcome: grid.Outcome) -> None:
            note = f"{run.mixer}, rate {run.rate:g}, seed {run.seed}: {outcome.far[-1]:.3f}"
            bars.update(task, advance=1, note=note)

        outcomes = grid.run_all(setting, folder, device=arguments.device, workers=workers, watch=watch)
    report.write(arguments.out, name, setting, outcomes, {"machine": machine(arguments.device)})
    title = f"{name}: {setting.task}"
    Console().print(report.table(setting, report.rows(outcomes), title))
    print(f"wrote {arguments.out / name}.json, .md and .png")
    return 0


def _chosen(arguments: argparse.Namespace) -> Setting:
    setting = PRESETS[arguments.preset][arguments.task]
    given: dict[str, Any] = {
        name: tuple(dict.fromkeys(getattr(arguments, name)))
        for name in ("mixers", "rates", "seeds")
        if hasattr(arguments, name)
    }
    if arguments.steps is not None:
        given["schedule"] = replace(setting.schedule, steps=arguments.steps)
    missing = not_installed(given.get("mixers", setting.mixers))
    if missing and "mixers" in given:
        raise RefusedError(f"--mixers: {needed(missing)}")
    if missing:
        print(f"left out: {needed(missing)}")
        given["mixers"] = tuple(name for name in setting.mixers if name not in missing)
    return replace(setting, **given)
