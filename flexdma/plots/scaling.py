"""Time against length and against window, from the results of `python -m flexdma bench`."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexdma.plots.colours import series_style

# (section of the results, the size that varies, the size that is constant)
PANELS = (("lengths", "length", "window"), ("windows", "window", "length"))
NAMES = {"length": "N", "window": "w"}


def scaling_figure(results: dict[str, Any]) -> Figure:
    """Up to two logarithmic panels: milliseconds of the forward against N, and against w.

    results: the JSON of `python -m flexdma bench --out FOLDER`.  Raises ValueError where it has neither.
    """
    records = [dict(zip(results["columns"], record, strict=True)) for record in results["records"]]
    times = [record for record in records if record["metric"] == "seconds"]
    panels = [panel for panel in PANELS if any(record["section"] == panel[0] for record in times)]
    if not panels:
        raise ValueError(
            "results: expected times by length or by window, got none; the suite or its time did not reach them"
        )
    figure = Figure(figsize=(1.2 + 5.2 * len(panels), 4.2), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (section, varies, constant) in zip(row, panels, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for record in times:
            if record["section"] == section:
                shape = results["shapes"][record["shape"]]
                lines.setdefault(record["contender"], []).append((shape[varies], 1e3 * record["value"]))
        _panel(axes, lines, NAMES[varies])
        axes.set_title(f"forward, {NAMES[constant]} = {shape[constant]:,}")
    row[0].set_ylabel("milliseconds")
    machine = results["machine"]
    figure.suptitle(f"{machine['device']}, {results['dtype']}, {results['heads']}", fontsize=10)
    return figure


def _panel(axes: Axes, lines: dict[str, list[tuple[int, float]]], across: str) -> None:
    for index, (name, points) in enumerate(lines.items()):
        label = "ranking + lifespans" if name == "selection" else name
        style: dict[str, Any] = {"marker": "o", "markersize": 4, **series_style(index)}
        axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(across)
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=9)
