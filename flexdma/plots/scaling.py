"""Time against length and against window, from the results of `python -m flexdma bench`."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flexdma.plots.colours import series_style

# section of the results, what varies, what is constant
PANELS = (("lengths", "length", "window"), ("windows", "window", "length"))
NAMES = {"length": "N", "window": "w"}


def scaling_figure(results: dict[str, Any]) -> Figure:
    """Two panels, logarithmic: milliseconds of the forward against N, and against w.

    results: what `python -m flexdma bench --out FOLDER` wrote as JSON, of a suite that measures both.
    Raises ValueError where they hold neither.
    """
    panels = [panel for panel in PANELS if results.get(panel[0])]
    if not panels:
        raise ValueError(
            "results: expected times by length or by window, got none; the suite or its time did not reach them"
        )
    figure = Figure(figsize=(1.2 + 5.2 * len(panels), 4.2), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (section, varies, constant) in zip(row, panels, strict=True):
        _panel(axes, results[section], varies)
        axes.set_title(f"forward, {NAMES[constant]} = {results[section][0][constant]:,}")
    row[0].set_ylabel("milliseconds")
    machine = results["machine"]
    figure.suptitle(f"{machine['device']}, {results['dtype']}, {results['heads']}", fontsize=10)
    return figure


def _panel(axes: Axes, cases: list[dict[str, Any]], varies: str) -> None:
    names = list(dict.fromkeys(name for case in cases for name in case["seconds"]))
    for index, name in enumerate(names):
        points = [(case[varies], 1e3 * case["seconds"][name]) for case in cases if name in case["seconds"]]
        label = "ranking + lifespans" if name == "selection" else name
        across, up = zip(*points, strict=True)
        style: dict[str, Any] = {"marker": "o", "markersize": 4, **series_style(index)}
        axes.plot(across, up, label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(NAMES[varies])
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=9)
