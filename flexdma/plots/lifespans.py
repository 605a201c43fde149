"""Lifespans as lines, and histograms of lifetimes."""

from collections.abc import Sequence

import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from torch import Tensor

from flexdma import Lifespans
from flexdma.plots.arguments import Layers, head_name, labelled_layers, one_head, one_row
from flexdma.plots.colours import QUERY, SERIES
from flexdma.plots.tokens import drawable

NAMED_KEYS = 100  # largest number of keys with tokens beside their lines


def lifespan_figure(
    lifespans: Lifespans,
    *,
    gate: Tensor | None = None,
    tokens: Sequence[str] | None = None,
    query: int | None = None,
    batch: int = 0,
    head: int = 0,
    title: str | None = None,
) -> Figure:
    """One horizontal line per key of one head, from its birth to its death; a dot for a key that no query sees.

    lifespans, gate: [B, H, K], of which `batch` and `head` are drawn, or [K].  gate: colours the lines; None = by lifetime.
    tokens: K strings, drawn beside the lines of short texts.
    query: draw a vertical line at this position, which crosses the lines of exactly the keys that it sees.
    """
    birth, death = one_head(lifespans, batch, head)
    length = len(birth)
    lifetime = (death - birth).double()
    seen = lifetime > 0
    named = tokens is not None and length <= NAMED_KEYS
    figure = Figure(figsize=(10, max(4.5, 0.13 * length + 1.5) if named else 7), layout="constrained")
    axes = figure.subplots()
    rows = range(length)
    segments = [
        [(start, key), (end, key)] for key, start, end in zip(rows, birth.tolist(), death.tolist(), strict=True)
    ]
    colours = lifetime if gate is None else one_row("gate", gate, batch, head, length)
    finite = colours[seen & colours.isfinite()]
    low, high = (finite.min().item(), finite.max().item()) if len(finite) else (0.0, 1.0)
    lines = LineCollection(
        [segment for segment, there in zip(segments, seen.tolist(), strict=True) if there],
        array=colours[seen].numpy(),
        cmap="viridis_r" if gate is not None else "plasma_r",
        norm=LogNorm(1, max(length, 2)) if gate is None else Normalize(low, high if high > low else low + 1),
        linewidths=min(4.0, max(0.8, 400 / length)),
    )
    axes.add_collection(lines)
    figure.colorbar(lines, ax=axes, label="gate of the key" if gate is not None else "lifetime (queries that see it)")
    never = (~seen).nonzero().flatten()
    if len(never):
        label = f"never visible: {len(never):,} of {length:,} keys"
        axes.plot(never.numpy(), never.numpy(), ".", color="#888888", markersize=3, label=label)
    if query is not None:
        count = int(((birth <= query) & (query < death)).sum())
        # At query + 0.5: the line of a key from 3 to 5 is then crossed by queries 3 and 4.
        axes.axvline(query + 0.5, color=QUERY, linewidth=1.2, label=f"query {query} crosses the {count} keys it sees")
    axes.set_xlim(0, length)
    axes.set_ylim(length - 0.5, -0.5)
    if tokens is not None and named:
        axes.set_yticks(rows, [drawable(token) for token in tokens], fontsize=8, family="DejaVu Sans Mono")
        axes.tick_params(axis="y", length=0)
    axes.set_xlabel("position of the query")
    axes.set_ylabel("key (position in the text)")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower left", fontsize=9, framealpha=1)
    axes.set_title(
        title or "Lifespans: each key is visible from its birth until better ones evict it, once", fontsize=11
    )
    return figure


def lifetime_figure(
    lifespans: Layers, *, window_size: int | None = None, batch: int = 0, title: str | None = None
) -> Figure:
    """Histogram of lifetimes, one panel per label, one bar per layer and head.

    lifespans: [B, H, K] of one layer, a list of layers, or {label: layers}.
    Counts only keys of the first half, because the text ends before later keys could live long.
    """
    rows = labelled_layers(lifespans)
    heads, length = next(iter(rows.values()))[0].birth.shape[1:]
    born = max(1, length // 2)
    figure = Figure(figsize=(6 * len(rows), 4.4), layout="constrained")
    panels = figure.subplots(1, len(rows), squeeze=False, sharey=True)[0]
    powers = [0, *(2**n for n in range((born - 1).bit_length()))]
    edges = torch.tensor([*powers, length + 1], device="cpu")
    names = ["0", *(f"{low}+" for low in powers[1:-1]), f"≥ {powers[-1]}"]
    for axes, (label, layers) in zip(panels, rows.items(), strict=True):
        for index in range(len(layers) * heads):
            layer, head = divmod(index, heads)
            birth, death = one_head(layers[layer], batch, head)
            share = torch.histogram((death - birth)[:born].float(), bins=edges.float()).hist / born
            offset = (index + 0.5) / (len(layers) * heads) - 0.5
            axes.bar(
                (torch.arange(len(share), device="cpu") + 0.8 * offset).numpy(),
                share.numpy(),
                width=0.8 / (len(layers) * heads),
                color=SERIES[index % len(SERIES)],
                label=head_name(layer, head, layers=len(layers)),
            )
        # Logarithmic, so that the few long-lived keys show.
        axes.set_yscale("log")
        axes.set_ylim(0.5 / born, 1.5)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        if window_size is not None:
            place = int(torch.bucketize(window_size, edges, right=True)) - 1
            axes.axvline(place, color="#999999", linestyle="--", linewidth=1, label=f"w = {window_size}")
        axes.set_title(label)
        axes.set_xlabel("lifetime of a key, in queries (0: never visible)")
        axes.legend(fontsize=9)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("share of keys")
    figure.suptitle(title or f"How long keys stay visible, over {length:,} positions")
    return figure
