"""The sizes of the experiments: for two CPU cores, for one GPU, and as in the papers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flexdma.tools.experiments.gate_variants import GATE_VARIANTS
from flexdma.tools.experiments.mixers import MIXERS, ModelSizes
from flexdma.tools.experiments.probes import GateCourse, HeatMap, Probe
from flexdma.tools.experiments.tasks import Copying, Language, Needles, Recall, Task
from flexdma.tools.experiments.training import Schedule

# For the longer experiments.  A choice that reads the whole sequence predicts no next byte.
CAUSAL = (
    "full", "full + slope", "FoX", "MLA", "NSA", "window", "sinks + window", "DMA", "DMA identity", "DMA + slope",
    "DMA + forget", "DMA recent", "DMA recent + slope", "DMA recent + forget",
)  # fmt: skip
# Without NSA, whose mask is dense (16,384² numbers per head), and with fewer unbounded ones, for time.
NEEDLES = tuple(name for name in CAUSAL if name not in ("FoX", "MLA", "NSA"))
TEXTS = ("python", "networkx")
RATES = (1e-3, 3e-3, 1e-2)
# Of 300 steps: at 0.001 full attention has not learned recall by then.
FAST = (3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Setting:
    """One task, and how all mixers are trained on it.  probe: what is measured besides answers."""

    task: Task
    sizes: ModelSizes
    schedule: Schedule
    mixers: tuple[str, ...] = tuple(MIXERS)
    rates: tuple[float, ...] = RATES
    seeds: tuple[int, ...] = (0, 1, 2)
    probe: Probe | None = None


def _recall(
    length: int, pairs: int, sizes: ModelSizes, schedule: Schedule, rates: tuple[float, ...] = RATES, **more: Any
) -> dict[str, Setting]:
    recall = partial(Recall, length=length, pairs=pairs, questions=4 * pairs, **more)
    stacked = recall()
    tasks: dict[str, Task] = {
        "stacked": stacked,
        "unstacked": recall(form="unstacked"),
        "overwritten": recall(overwritten=pairs // 2),
        "copying": Copying(length=length, tokens=pairs),
    }
    settings = {name: Setting(task, sizes, schedule, rates=rates) for name, task in tasks.items()}
    settings["gates"] = Setting(stacked, sizes, schedule, tuple(GATE_VARIANTS), rates, probe=GateCourse())
    return settings


def _language(
    length: int, window: int, sizes: Mapping[int, int], schedule: Schedule, **more: Any
) -> dict[str, Setting]:
    """lm-TEXT-WIDTH for both texts.  sizes: width -> layers."""
    return {
        f"lm-{text}-{width}": Setting(
            Language(length, text), ModelSizes(width, layers, max(2, width // 32), max(2, width // 64), window), schedule,
            mixers=CAUSAL, **more,
        )
        for text in TEXTS for width, layers in sizes.items()
    }  # fmt: skip


# paper: the widths and lengths of zoology (arXiv 2312.04927); documented, and not run by this project.
PRESETS: Mapping[str, Mapping[str, Setting]] = {
    "cpu": {
        **_recall(128, 8, ModelSizes(), Schedule(steps=300, batch=16, every=50, held_out=128), FAST),
        # Two layers, one of which counts.  With 8 tokens in 128 positions full attention has 0.59 after 1,000 steps.
        "copying": Setting(
            Copying(length=64, tokens=4, noise=8), ModelSizes(layers=2),
            Schedule(steps=1500, batch=16, every=100, held_out=128), rates=(3e-3,),
        ),
        "niah": Setting(
            Needles(), ModelSizes(window=64), Schedule(steps=1600, batch=8, held_out=64, anneal=0.5), mixers=NEEDLES,
            rates=(3e-3,), probe=HeatMap(),
        ),
        **_language(256, 32, {32: 2, 64: 2, 128: 2}, Schedule(steps=400, batch=4, held_out=64), rates=(3e-3,)),
    },
    "gpu": {
        **_recall(512, 16, ModelSizes(layers=2, window=32), Schedule(steps=4000, batch=64, every=200)),
        "niah": Setting(
            Needles(needles=16, digits=3), ModelSizes(width=128, layers=2, window=128),
            Schedule(steps=4000, batch=64, every=200), mixers=NEEDLES, probe=HeatMap(tokens=2**18),
        ),
        **_language(1024, 128, {128: 4, 256: 4, 512: 6}, Schedule(steps=2000, batch=32, every=200), rates=(1e-3, 3e-3)),
    },
    "paper": {
        **_recall(
            1024, 64, ModelSizes(width=128, layers=2, window=128), Schedule(steps=20_000, batch=128, every=1000),
            keys=4096, values=4096, noise=64,
        ),
        "niah": Setting(
            Needles(needles=16, digits=7), ModelSizes(width=256, layers=4, heads=8, kv_heads=4, window=256),
            Schedule(steps=20_000, batch=128, every=1000), mixers=NEEDLES, probe=HeatMap(depths=16, tokens=2**20),
        ),
        **_language(2048, 256, {512: 8, 768: 12, 1024: 24}, Schedule(steps=20_000, batch=128, every=1000)),
    },
}  # fmt: skip


def experiment_of(name: str) -> str:
    """What trains a setting on the command line: lm for lm-python-64."""
    return name.split("-")[0]


EXPERIMENTS = tuple(dict.fromkeys(map(experiment_of, PRESETS["cpu"])))


def settings_of(experiment: str, preset: str) -> dict[str, Setting]:
    """The settings of one of EXPERIMENTS, by their names."""
    return {name: setting for name, setting in PRESETS[preset].items() if experiment_of(name) == experiment}


def with_text(settings: Mapping[str, Setting], path: Path) -> dict[str, Setting]:
    """The settings of `lm` with one text in place of TEXTS, one for each width."""
    name = re.sub(r"\W+", "_", path.stem)
    found = {}
    for setting in settings.values():
        assert isinstance(setting.task, Language)
        found[f"lm-{name}-{setting.sizes.width}"] = replace(setting, task=replace(setting.task, text=str(path)))
    return found
