"""All runs of a setting: mixers x learning rates x seeds.  Each finished run is a file; a second call trains the others."""

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flexdma.atomic_write import atomic_write
from flexdma.tools.experiments.presets import Setting
from flexdma.tools.experiments.training import Outcome, train
from flexdma.tools.refusal import RefusedError


class Run(NamedTuple):
    """One training of a setting."""

    mixer: str
    rate: float
    seed: int

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.mixer.replace(' ', '-')}-{self.rate:g}-{self.seed}.json"


def runs_of(setting: Setting) -> list[Run]:
    """All runs, seed by seed, so that an interrupted experiment has whole rows of mixers."""
    return [Run(mixer, rate, seed) for seed in setting.seeds for rate in setting.rates for mixer in setting.mixers]


def as_settings(setting: Setting) -> dict[str, Any]:
    """What a run depends on besides mixer, rate and seed, as JSON has it."""
    shared = asdict(replace(setting, mixers=(), rates=(), seeds=()))
    return json.loads(json.dumps({name: value for name, value in shared.items() if value is not None}))


def finished(setting: Setting, folder: Path) -> dict[Run, Outcome]:
    """The outcomes that `folder` has.  Raises RefusedError where they are of other settings."""
    described = folder / "setting.json"
    if described.exists() and json.loads(described.read_text()) != as_settings(setting):
        raise RefusedError(f"--out: expected a new folder or runs of the same sizes, got {folder} with runs of others")
    found = {}
    for run in runs_of(setting):
        path = folder / run.file
        if path.exists():
            found[run] = Outcome.from_dict(json.loads(path.read_text()))
    return found


def run_all(
    setting: Setting, folder: Path, *, device: str, workers: int, watch: Callable[[Run, Outcome], None]
) -> dict[Run, Outcome]:
    """Train what `folder` does not have yet.  watch: called after every run, in the calling process.

    workers: processes, each with one thread; 1 = in this process, with its threads.
    """
    outcomes = finished(setting, folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "setting.json", as_settings(setting))
    missing = [run for run in runs_of(setting) if run not in outcomes]
    for run, outcome in _trained(setting, missing, device, workers):
        _write(folder / run.file, outcome.as_dict())
        outcomes[run] = outcome
        watch(run, outcome)
    return {run: outcomes[run] for run in runs_of(setting)}


def _trained(setting: Setting, runs: list[Run], device: str, workers: int) -> Iterator[tuple[Run, Outcome]]:
    if workers == 1 or len(runs) < 2:
        for run in runs:
            yield run, _train(setting, run, device)
        return
    # Spawned, because a process that has used threads or CUDA cannot fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=start_worker)
    try:
        waiting = {pool.submit(_train, setting, run, device): run for run in runs}
        for done in as_completed(waiting):
            yield waiting[done], done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """One thread, and an end when the parent ends: a killed parent would leave a worker training runs that nobody writes."""
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _train(setting: Setting, run: Run, device: str) -> Outcome:
    return train(
        run.mixer, setting.task, setting.sizes, setting.schedule, rate=run.rate, seed=run.seed, device=device,
        probe=setting.probe,
    )  # fmt: skip


def _write(path: Path, contents: dict[str, Any]) -> None:
    text = json.dumps(contents, indent=1, allow_nan=False) + "\n"
    atomic_write(path, lambda part: part.write_text(text))
