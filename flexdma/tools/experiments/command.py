"""python -m flexdma experiments: the options, and experiments from training to report, or from results to a page."""

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from flexdma.tools import arguments as types
from flexdma.tools.byte_models.text import TextError
from flexdma.tools.experiments.gate_variants import CANDIDATES
from flexdma.tools.experiments.mixers import MIXERS, needed, not_installed
from flexdma.tools.experiments.presets import EXPERIMENTS, PRESETS, Setting, settings_of, with_text
from flexdma.tools.experiments.tasks import Language
from flexdma.tools.machine import machine
from flexdma.tools.refusal import RefusedError, check_installed, refusing

RESULTS = "results"  # makes the page
PAGE = Path("docs/results.md")

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m flexdma experiments`."""
    parser.add_argument(
        "task", choices=[*EXPERIMENTS, RESULTS],
        help="stacked, unstacked, overwritten: recall of pairs among noise; copying: tokens among noise, in order; gates: "
        "variants of the gate on stacked; niah: numbers hidden in up to 32 times the trained length; lm: bytes of two real "
        "texts at three sizes; results: write --page from results that are there",
    )  # fmt: skip
    parser.add_argument(
        "--preset", choices=list(PRESETS), default="cpu",
        help="sizes for two CPU cores, one GPU, or as in the papers (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--mixers", type=types.one_of(list(CANDIDATES)), nargs="+", metavar="MIXER", default=argparse.SUPPRESS,
        help=f"of {', '.join(CANDIDATES)} (default: the task's that are installed)",
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
        "--anneal", type=types.bounded(float, least=0, most=1), metavar="SHARE", default=None,
        help="of the steps, in which the windows of DMA shrink from the whole sequence to w (default: the preset's)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=types.output_folder, metavar="DIR", default="experiments",
        help="folder for runs, table and picture; a second call trains the runs that are missing (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", type=types.device(), default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument(
        "--workers", type=types.positive_int, metavar="N", default=None,
        help="processes of one thread each (default: one per CPU core; 1 on a GPU)",
    )  # fmt: skip
    parser.add_argument(
        "--text", type=types.input_file, metavar="FILE", default=None,
        help="for lm: a text in place of the two (default: Python's documentation, networkx's docstrings)",
    )  # fmt: skip
    parser.add_argument(
        "--page", type=types.output_file, metavar="FILE", default=None,
        help=f"for results: the page, made from experiments-NAME.json in the folder of the same name (default: {PAGE})",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Train what is missing, print the tables, write JSON, tables and pictures; or write the page."""
    check_installed("matplotlib", "rich", extra="experiments")
    if arguments.task == RESULTS:
        return _write_page(arguments.page or PAGE)
    # Imported here, because these need matplotlib and rich.
    from rich.console import Console

    from flexdma.tools.experiments import grid
    from flexdma.tools.experiments.experiment import Experiment
    from flexdma.tools.experiments.reports.pictures import language_pictures, pictures
    from flexdma.tools.experiments.reports.tables import markdown, table
    from flexdma.tools.progress import progress_bars

    settings = _chosen(arguments)
    workers = arguments.workers or (len(os.sched_getaffinity(0)) if arguments.device == "cpu" else 1)
    experiments = []
    with progress_bars() as bars:
        for name, setting in settings.items():
            folder = arguments.out / f"{name}-{arguments.preset}"
            done, total = grid.finished(setting, folder), len(grid.runs_of(setting))
            shown = bars.add_task(folder.name, total=total, completed=len(done), note="")

            def watch(run: grid.Run, outcome: grid.Outcome, shown: Any = shown) -> None:
                note = f"{run.mixer}, rate {run.rate:g}, seed {run.seed}: loss {outcome.loss[-1]:.3f}"
                bars.update(shown, advance=1, note=note)

            outcomes = grid.run_all(setting, folder, device=arguments.device, workers=workers, watch=watch)
            about = machine(arguments.device) | ({"threads": 1} if workers > 1 else {})
            experiments.append(
                Experiment(name, arguments.preset, grid.as_settings(setting), about, list(outcomes.values()))
            )
    for experiment in experiments:
        experiment.write(arguments.out / f"{experiment.name}.json")
        (arguments.out / f"{experiment.name}.md").write_text(markdown(experiment))
        pictures(arguments.out, "", experiment)
        Console().print(table(experiment))
        print(f"wrote {arguments.out / experiment.name}.json, .md and .png")
    language_pictures(arguments.out, "", [experiment for experiment in experiments if experiment.kind == "lm"])
    return 0


def _write_page(path: Path) -> int:
    from flexdma.tools.experiments.reports.page import read_experiments, write_page

    if not path.with_suffix("").is_dir():
        raise RefusedError(f"--page: expected the JSON of experiments in {path.with_suffix('')}, got no such folder")
    with refusing(ValueError, OSError):
        experiments = read_experiments(path.with_suffix(""))
    write_page(path, experiments)
    print(f"wrote {path} from {len(experiments)} experiments")
    return 0


def _chosen(arguments: argparse.Namespace) -> dict[str, Setting]:
    """The settings by name, with the options applied."""
    settings = settings_of(arguments.task, arguments.preset)
    if arguments.text is not None:
        if arguments.task != "lm":
            raise RefusedError(f"--text: expected the task lm, got {arguments.task}")
        settings = with_text(settings, arguments.text)
    given: dict[str, Any] = {
        name: tuple(dict.fromkeys(getattr(arguments, name)))
        for name in ("mixers", "rates", "seeds")
        if hasattr(arguments, name)
    }
    schedule = {name: getattr(arguments, name) for name in ("steps", "anneal") if getattr(arguments, name) is not None}
    with refusing(TextError):
        chosen = {name: _with_options(setting, given, schedule) for name, setting in settings.items()}
    return _without_missing(chosen, is_given="mixers" in given)


def _with_options(setting: Setting, given: dict[str, Any], schedule: dict[str, Any]) -> Setting:
    changed = replace(setting, **given, schedule=replace(setting.schedule, **schedule))
    if isinstance(setting.task, Language):
        changed = replace(changed, task=setting.task.with_digest())
    return changed


def _without_missing(settings: dict[str, Setting], *, is_given: bool) -> dict[str, Setting]:
    """Without mixers whose package is not installed.  is_given: the user named the mixers; raises RefusedError then."""
    mixers = dict.fromkeys(name for setting in settings.values() for name in setting.mixers if name in MIXERS)
    missing = not_installed(mixers)
    if missing and is_given:
        raise RefusedError(f"--mixers: {needed(missing)}")
    if missing:
        print(f"left out: {needed(missing)}")
    return {
        name: replace(setting, mixers=tuple(mixer for mixer in setting.mixers if mixer not in missing))
        for name, setting in settings.items()
    }
