"""Needles by length and depth, as a picture: a map per mixer, with the memory of its keys and values."""

from statistics import fmean

from matplotlib.figure import Figure

from flexdma.rounding import ceil_div
from flexdma.tools.experiments.experiment import Experiment, Row
from flexdma.tools.experiments.reports.columns import kilobytes

ACROSS = 4  # maps in a row


def heat_maps(experiment: Experiment) -> Figure:
    """Depth down, length across; the mean over seeds at each mixer's best rate."""
    rows = experiment.rows()
    across = min(ACROSS, len(rows))
    down = ceil_div(len(rows), across)
    result = Figure(figsize=(2.6 * across + 1, 2.6 * down), layout="constrained")
    panels = result.subplots(down, across, squeeze=False).flatten().tolist()
    for panel in panels[len(rows) :]:
        panel.set_visible(False)
    lengths = rows[0].probed("lengths")[0]
    for panel, row in zip(panels, rows, strict=False):
        shares = accuracy(row)
        drawn = panel.imshow(list(zip(*shares, strict=True)), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        panel.set_title(f"{row.mixer}: {kilobytes(row)} KiB at {lengths[-1]:,}", fontsize=8)
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=60, fontsize=7)
        panel.set_yticks([0, len(shares[0]) - 1], ["start", "end"], fontsize=7)
    result.colorbar(drawn, ax=panels, label="accuracy of digits", shrink=0.8)
    return result


def accuracy(row: Row) -> list[list[float]]:
    """[lengths][depths], the mean over seeds; NaN where none asked there."""
    maps = row.probed("accuracy")
    return [
        [_mean([found[length][depth] for found in maps]) for depth in range(len(maps[0][0]))]
        for length in range(len(maps[0]))
    ]


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return fmean(known) if known else float("nan")
