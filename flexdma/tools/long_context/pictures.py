"""Likelihood against position, and needles by length and depth, each for a light and a dark page."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from flexdma.plots.colours import series_style
from flexdma.tools.long_context.contenders import FULL
from flexdma.tools.long_context.measure import NEEDLES, NLL
from flexdma.tools.long_context.summary import Summary

# The background is transparent: the page shows through.  Ink of text and lines; colours of a needle lost and found.
THEMES = {"light": ("#1F2328", ("#F2F2F2", "#0B3C6F")), "dark": ("#E6EDF3", ("#21262D", "#9BD3FF"))}
INKED: tuple[Any, ...] = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")


def pictures(summary: Summary) -> dict[str, Callable[[str], Figure]]:
    """By name, a function of the theme ("light" or "dark") that draws the figure; only those that have results."""
    made: dict[str, Callable[[str], Figure]] = {}
    if summary.has(NLL):
        made["nll"] = lambda theme: _themed(theme, nll_figure, summary)
    if summary.has(NEEDLES):
        made["needles"] = lambda theme: _themed(theme, needle_figure, summary)
    return made


def as_svg(figure: Figure) -> str:
    """The figure as SVG, without a background."""
    written = io.StringIO()
    # Without date and random ids, so that the same results are the same file.
    with matplotlib.rc_context({"svg.hashsalt": "flexdma"}):
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return written.getvalue()


def nll_figure(summary: Summary, tiles: tuple[str, str]) -> Figure:
    """The likelihood by position (left), and what it is worse than that of full attention (right)."""
    ranges = summary.ranges()[:-1]
    edges = [ranges[0][0], *(last for _, last in ranges)]
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    full = [summary.nll(FULL, *each) for each in ranges]
    for index, name in enumerate(summary.contenders):
        values = [summary.nll(name, *each) for each in ranges]
        if None not in values:
            left.stairs(values, edges, baseline=None, label=name, linewidth=1.8, **_line(index))
            if None not in full:
                more = [one - other for one, other in zip(values, full, strict=True)]  # type: ignore[operator]
                right.stairs(more, edges, baseline=None, linewidth=1.8, **_line(index))
    left.set_ylabel("nll per token, nats")
    right.set_ylabel("nll above full attention, nats")
    for axes in (left, right):
        axes.axvline(summary.ranges()[-1][0], color="#999999", linewidth=0.8, linestyle=":")
        axes.set_xlabel("position in the context (dotted: keys of a bounded cache)")
        axes.grid(alpha=0.25)
    left.legend(framealpha=0)
    return figure


def needle_figure(summary: Summary, tiles: tuple[str, str]) -> Figure:
    """For each contender the share of needles found at each length and depth, all kinds and seeds together."""
    names = [name for name in summary.contenders if summary.needles(name) is not None]
    lengths, depths = (sorted(summary.distinct(NEEDLES, name)) for name in ("length", "depth"))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(1 + 2.6 * columns, 0.6 + (1.2 + 0.32 * len(depths)) * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(grid, names, strict=False):
        _heat_map(axes, summary, name, lengths, depths, tiles)
        axes.set_title(name, fontsize=10)
    for axes in grid[len(names) :]:
        axes.set_axis_off()
    for axes in grid[::columns]:
        axes.set_ylabel("depth")
    figure.supxlabel("tokens of the context", fontsize=10)
    return figure


def _heat_map(
    axes: Axes, summary: Summary, name: str, lengths: list[int], depths: list[float], tiles: tuple[str, str]
) -> None:
    shades = LinearSegmentedColormap.from_list("found", tiles)
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            found = summary.needles(name, length=length, depth=depth)
            if found is not None:
                shade = shades(found.rate)
                axes.fill_between([column, column + 1], row, row + 1, color=shade, linewidth=0)
                ink = "white" if sum(shade[:3]) < 1.4 else "black"
                axes.text(column + 0.5, row + 0.5, f"{found.rate:.0%}", color=ink, fontsize=7, ha="center", va="center")
    axes.set_xticks([column + 0.5 for column in range(len(lengths))], [f"{length:,}" for length in lengths])
    axes.set_yticks([row + 0.5 for row in range(len(depths))], [f"{depth:.0%}" for depth in depths])
    axes.set_xlim(0, len(lengths))
    axes.set_ylim(len(depths), 0)
    axes.tick_params(length=0, labelsize=8)


def _line(index: int) -> dict[str, str]:
    style = series_style(index)
    # Grey of this lightness is seen on both pages.
    return {**style, "color": "#888888" if style["color"] == "#444444" else style["color"]}


def _themed(theme: str, draw: Callable[[Summary, tuple[str, str]], Figure], summary: Summary) -> Figure:
    ink, tiles = THEMES[theme]
    with matplotlib.rc_context(dict.fromkeys(INKED, ink)):
        return draw(summary, tiles)
