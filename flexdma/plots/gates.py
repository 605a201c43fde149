"""Gates along a text, with the tokens below."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from flexdma import Lifespans
from flexdma.plots.arguments import one_head, one_row
from flexdma.plots.colours import EVICTED, KEPT, NEVER, QUERY
from flexdma.plots.tokens import drawable
from flexdma.rounding import ceil_div


def gate_figure(
    gate: Tensor,
    tokens: Sequence[str],
    *,
    lifespans: Lifespans | None = None,
    query: int | None = None,
    per_line: int = 80,
    batch: int = 0,
    head: int = 0,
    title: str | None = None,
) -> Figure:
    """One bar per key with the gate of one head, its token below, `per_line` tokens per line.

    gate, lifespans: [B, H, K], of which `batch` and `head` are drawn, or [K].  tokens: K strings.
    With lifespans the colours show which keys `query` (default: the last) sees: kept, evicted, never visible, yet to come.
    """
    length = len(tokens)
    heights = one_row("gate", gate, batch, head, length)
    last = length - 1 if query is None else query
    colours, legend = [KEPT] * length, {"gate": KEPT}
    if lifespans is not None:
        colours, legend = _states(one_head(lifespans, batch, head), last)

    lines = ceil_div(length, per_line)
    figure = Figure(figsize=(0.155 * min(length, per_line) + 1.4, 1.75 * lines + 1.1), layout="constrained")
    panels = figure.subplots(lines, 1, squeeze=False, sharey=True)[:, 0]
    finite = heights[heights.isfinite()]
    low, high = (finite.min().item(), finite.max().item()) if len(finite) else (0.0, 1.0)
    # Bars start near the smallest gate, because bars of nearly equal gates from 0 would look equally high.
    floor = 0.0 if low >= 0 and low < (high - low) else low - 0.08 * (high - low or 1)
    for line, axes in enumerate(panels):
        there = slice(line * per_line, (line + 1) * per_line)
        _draw_line(axes, heights[there], floor, tokens[there], colours[there], first=there.start)
        axes.set_xlim(-0.8, per_line - 0.2 if lines > 1 else length - 0.2)
        axes.set_ylabel("gate")
        if lifespans is not None and there.start <= last < there.stop:
            axes.axvline(last - there.start, color=QUERY, linewidth=1.2, zorder=0)
    panels[0].set_ylim(floor, high + 0.05 * ((high - floor) or 1))
    panels[-1].set_xlabel("tokens of the text, one key each")
    if lifespans is not None:
        handles = [Patch(facecolor=colour, edgecolor="#888888", label=name) for name, colour in legend.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    default = "Gates along the text" if lifespans is None else f"Gates along the text, and what query {last} sees"
    figure.suptitle(title or default)
    return figure


def _draw_line(
    axes: Axes, heights: Tensor, floor: float, tokens: Sequence[str], colours: list[str], first: int
) -> None:
    places = range(len(tokens))
    # A gate that is not finite has no bar, only a token.
    shown = torch.where(heights.isfinite(), heights, floor)
    axes.bar(places, (shown - floor).tolist(), bottom=floor, color=colours, edgecolor="#777777", linewidth=0.3)
    axes.set_xticks(places, [drawable(token) for token in tokens], fontsize=8, family="DejaVu Sans Mono")
    axes.tick_params(axis="x", length=0, pad=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.text(0.0, 1.02, f"from {first}", transform=axes.transAxes, fontsize=7, color="#555555")


def _states(alive: Lifespans, query: int) -> tuple[list[str], dict[str, str]]:
    """A colour for each key, and a legend {name: colour}."""
    legend = {f"kept by query {query}": KEPT, "evicted before it": EVICTED, "never visible": NEVER}
    colours = []
    for birth, death in zip(alive.birth.tolist(), alive.death.tolist(), strict=True):
        if birth > query:
            legend["yet to come"] = "#FFFFFF"
            colours.append("#FFFFFF")
        else:
            colours.append(NEVER if death <= birth else KEPT if query < death else EVICTED)
    return colours, legend
