"""Likelihood against position, needles by length and depth, and what heads keep, each for a light and a dark page."""

import io
import math
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


def pictures(summary: Summary) -> dict[str, dict[str, str]]:
    """By name and theme ("light", "dark") the picture as SVG, without a background; only those that have results."""
    draws: dict[str, Callable[[Summary, tuple[str, str]], Figure]] = {}
    if summary.has(NLL):
        draws["nll"] = nll_figure
    if summary.has(NEEDLES):
        draws["needles"] = needle_figure
    if "calibration" in summary.about:
        draws["heads"] = heads_figure
    return {name: {theme: _svg(draw, summary, theme) for theme in THEMES} for name, draw in draws.items()}


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


def heads_figure(summary: Summary, tiles: tuple[str, str]) -> Figure:
    """By layer and KV head, the keys that are kept by gate, and how well a key's future is predicted."""
    shades = LinearSegmentedColormap.from_list("kept", tiles)
    calibration = summary.about["calibration"]
    layers, heads = len(calibration["windows"]), max(map(len, calibration["windows"]))
    figure = Figure(figsize=(2.6 + 0.24 * layers, 2 + 0.5 * heads), layout="constrained")
    grid = figure.subplots(2, 1, sharex=True)
    for axes, name, label in zip(grid, ("windows", "r_squared"), ("keys kept by gate", "R squared"), strict=True):
        # Layers may have different numbers of heads.
        rows = [[*layer, *[math.nan] * (heads - len(layer))] for layer in calibration[name]]
        mesh = axes.pcolormesh(list(zip(*rows, strict=True)), cmap=shades, vmin=0, edgecolors="none")
        figure.colorbar(mesh, ax=axes)
        axes.set_title(label, fontsize=10, loc="left")
        axes.set_ylabel("KV head")
        axes.set_yticks([head + 0.5 for head in range(heads)], list(map(str, range(heads))))
        axes.invert_yaxis()
    step = max(1, layers // 16)
    grid[1].set_xticks([layer + 0.5 for layer in range(0, layers, step)], list(map(str, range(0, layers, step))))
    grid[1].set_xlabel("layer")
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


def _svg(draw: Callable[[Summary, tuple[str, str]], Figure], summary: Summary, theme: str) -> str:
    ink, tiles = THEMES[theme]
    written = io.StringIO()
    # Without date and random ids, so that the same results are the same file.
    with matplotlib.rc_context({**dict.fromkeys(INKED, ink), "svg.hashsalt": "flexdma"}):
        draw(summary, tiles).savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return written.getvalue()
