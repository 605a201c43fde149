"""The sizes of the experiments: for two CPU cores, for one GPU, and as in the papers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexdma.tools.experiments.mixers import MIXERS, ModelSizes
from flexdma.tools.experiments.tasks import Copying, Recall, Task
from flexdma.tools.experiments.training import Schedule


@dataclass(frozen=True)
class Setting:
    """One task, and how all mixers are trained on it."""

    task: Task
    sizes: ModelSizes
    schedule: Schedule
    mixers: tuple[str, ...] = tuple(MIXERS)
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: tuple[int, ...] = (0, 1, 2)


def _settings(length: int, pairs: int, sizes: ModelSizes, schedule: Schedule, **more: Any) -> dict[str, Setting]:
    tasks: dict[str, Task] = {
        "stacked": Recall(length=length, pairs=pairs, questions=2 * pairs, **more),
        "unstacked": Recall(length=length, pairs=pairs, questions=2 * pairs, form="unstacked", **more),
        "overwritten": Recall(length=length, pairs=pairs, questions=2 * pairs, overwritten=pairs // 2, **more),
        "copying": Copying(length=length, tokens=pairs),
    }
    return {name: Setting(task, sizes, schedule) for name, task in tasks.items()}


# paper: the widths and lengths of zoology (arXiv 2312.04927); documented, and not run by this project.
PRESETS: Mapping[str, Mapping[str, Setting]] = {
    "cpu": _settings(128, 8, ModelSizes(), Schedule()),
    "gpu": _settings(512, 16, ModelSizes(layers=2, window=32), Schedule(steps=4000, batch=64, every=200)),
    "paper": _settings(
        1024, 64, ModelSizes(width=128, layers=2, window=128), Schedule(steps=20_000, batch=128, every=1000),
        keys=4096, values=4096, noise=64,
    ),
}  # fmt: skip
