"""Gates over training, as a picture: a panel per number, a line per variant."""

from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from flexdma.plots.colours import series_style
from flexdma.tools.experiments.experiment import Experiment, mean_over_heads
from flexdma.tools.experiments.training import Outcome

PANELS = {
    "A": "A",
    "slope": "slope, logits per token",
    "ranked": "a pair's gate above noise, share",
    "beyond": "visible keys beyond w, share",
    "pairs_live": "queries that see a pair",
}


def gate_courses(experiment: Experiment) -> Figure:
    """The mean over heads, layers and seeds at each variant's best rate; first the accuracy of far questions."""
    result = Figure(figsize=(12, 6.4), layout="constrained")
    accuracy, *panels = result.subplots(2, 3).flatten().tolist()
    for index, row in enumerate(experiment.rows()):
        style: dict[str, Any] = series_style(index)
        steps = row.outcomes[0].steps
        far = [fmean(seeds) for seeds in zip(*(outcome.far for outcome in row.outcomes), strict=True)]
        accuracy.plot(steps, far, label=row.mixer, marker=".", **style)
        for panel, name in zip(panels, PANELS, strict=True):
            if name in row.outcomes[0].probed[0]:
                courses = zip(*(_course(outcome, name) for outcome in row.outcomes), strict=True)
                panel.plot(steps, list(map(fmean, courses)), marker=".", **style)
    accuracy.set_title("accuracy of far questions", fontsize=9)
    for panel, title in zip(panels, PANELS.values(), strict=True):
        panel.set_title(title, fontsize=9)
    for panel in (accuracy, *panels):
        panel.grid(alpha=0.25)
    result.legend(fontsize=8, loc="outside right center")
    result.supxlabel("training step", fontsize=9)
    return result


def _course(outcome: Outcome, name: str) -> list[float]:
    """The mean over layers and heads at each evaluation."""
    return [mean_over_heads(probed[name]) for probed in outcome.probed]
