"""Tables and pictures of an experiment's runs."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, pstdev
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from flexdma.atomic_write import atomic_write
from flexdma.plots.colours import series_style
from flexdma.tools.experiments.grid import Run, as_settings
from flexdma.tools.experiments.mixers import MIXERS
from flexdma.tools.experiments.presets import Setting
from flexdma.tools.experiments.training import SOLVED, Outcome, reach

NONE = "-"


class Row(NamedTuple):
    """A mixer at its best learning rate: the one with the largest mean of the last far accuracy over seeds.

    far, near: the last accuracy of each seed.  solved: the step of each seed that reached SOLVED.  outcomes: those runs.
    """

    mixer: str
    rate: float
    far: list[float]
    near: list[float]
    solved: list[int]
    outcomes: list[Outcome]


def rows(outcomes: Mapping[Run, Outcome]) -> list[Row]:
    """One row per mixer, in the order of the runs."""
    by_mixer: dict[str, dict[float, list[Outcome]]] = {}
    for outcome in outcomes.values():
        by_mixer.setdefault(outcome.mixer, {}).setdefault(outcome.rate, []).append(outcome)
    found = []
    for mixer, rates in by_mixer.items():
        rate = max(rates, key=lambda rate: mean(outcome.far[-1] for outcome in rates[rate]))
        best = rates[rate]
        solved = [step for outcome in best if (step := outcome.solved_at()) is not None]
        found.append(Row(mixer, rate, [o.far[-1] for o in best], [o.near[-1] for o in best], solved, best))
    return found


def table(setting: Setting, found: list[Row], title: str) -> Table:
    """A table with one row per mixer."""
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    result.add_column("\nmixer", no_wrap=True)
    for heading in (
        "far\naccuracy",
        "\n± over seeds",
        "near\naccuracy",
        f"steps to\n{SOLVED:g}",
        "best\nrate",
        "\nseconds",
    ):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in found:
        seeds = len(row.far)
        steps = NONE if not row.solved else f"{round(mean(row.solved))}"
        steps += f" ({len(row.solved)} of {seeds})" if 0 < len(row.solved) < seeds else ""
        seconds = mean(outcome.seconds for outcome in row.outcomes)
        cells = [f"{mean(row.far):.3f}", f"{pstdev(row.far):.3f}", _shown(mean(row.near)), steps, f"{row.rate:g}"]
        result.add_row(row.mixer, *cells, f"{seconds:.0f}", style="bold" if mean(row.far) >= SOLVED else None)
    bridged = reach(setting.sizes)
    result.caption = (
        f"far: the answer is more than {bridged} positions back, which {setting.sizes.layers} layer(s) of windows of "
        f"{setting.sizes.window} cannot reach;\nseeds {', '.join(map(str, setting.seeds))}; seconds: of one training"
    )
    return result


def markdown(found: list[Row]) -> str:
    """The same as a table of Markdown, with what each mixer sees."""
    lines = ["| mixer | a query sees | far | near | steps to 0.95 | rate |", "|---|---|---|---|---|---|"]
    for row in found:
        steps = f"{round(mean(row.solved))} ({len(row.solved)} of {len(row.far)})" if row.solved else NONE
        cells = [
            row.mixer,
            MIXERS[row.mixer].sees,
            f"{mean(row.far):.3f} ± {pstdev(row.far):.3f}",
            _shown(mean(row.near)),
        ]
        lines.append(f"| {' | '.join([*cells, steps, f'{row.rate:g}'])} |")
    return "\n".join(lines) + "\n"


def figure(found: list[Row], title: str) -> Figure:
    """Far accuracy over training, the mean over seeds at each mixer's best rate; a band from the worst to the best seed."""
    result = Figure(figsize=(9, 4.8), layout="constrained")
    axes = result.subplots()
    for index, row in enumerate(found):
        steps = row.outcomes[0].steps
        curves = list(zip(*(outcome.far for outcome in row.outcomes), strict=True))
        style: dict[str, Any] = series_style(index)
        axes.plot(steps, [mean(values) for values in curves], label=row.mixer, **style)
        axes.fill_between(steps, list(map(min, curves)), list(map(max, curves)), color=style["color"], alpha=0.15, lw=0)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("training step")
    axes.set_ylabel("accuracy of far questions")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return result


def write(folder: Path, name: str, setting: Setting, outcomes: Mapping[Run, Outcome], about: dict[str, Any]) -> None:
    """NAME.json with all runs, NAME.md and NAME.png."""
    found = rows(outcomes)
    contents = about | {
        "setting": as_settings(setting), "mixers": setting.mixers, "rates": setting.rates, "seeds": setting.seeds,
        "runs": [outcome.as_dict() for outcome in outcomes.values()],
    }  # fmt: skip
    atomic_write(folder / f"{name}.json", lambda part: part.write_text(json.dumps(contents) + "\n"))
    atomic_write(folder / f"{name}.md", lambda part: part.write_text(markdown(found)))
    atomic_write(folder / f"{name}.png", lambda part: figure(found, name).savefig(part, dpi=110))


def _shown(share: float) -> str:
    return NONE if math.isnan(share) else f"{share:.3f}"
