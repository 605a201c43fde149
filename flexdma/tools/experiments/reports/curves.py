"""The score over training, as a picture."""

from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from flexdma.plots.colours import series_style
from flexdma.tools.experiments.experiment import BITS, Experiment
from flexdma.tools.experiments.training import Outcome

MOST_BANDS = 8  # more hide each other


def curves(experiment: Experiment) -> Figure:
    """The mean over seeds at each mixer's best rate, and of few mixers a band from the worst to the best seed."""
    result = Figure(figsize=(9, 4.8), layout="constrained")
    axes = result.subplots()
    is_language = experiment.kind == "lm"

    def scores(outcome: Outcome) -> list[float]:
        return [loss * BITS for loss in outcome.loss] if is_language else outcome.far

    rows = experiment.rows()
    for index, row in enumerate(rows):
        steps = row.outcomes[0].steps
        values = list(zip(*map(scores, row.outcomes), strict=True))
        style: dict[str, Any] = series_style(index)
        axes.plot(steps, list(map(fmean, values)), label=row.mixer, marker=".", **style)
        if len(rows) <= MOST_BANDS:
            worst, best = list(map(min, values)), list(map(max, values))
            axes.fill_between(steps, worst, best, color=style["color"], alpha=0.15, lw=0)
    if not is_language:
        axes.set_ylim(0, 1.02)
    axes.set_xlabel("training step")
    axes.set_ylabel("bits per byte of held-out text" if is_language else "accuracy of far questions")
    axes.set_title(experiment.name)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return result
