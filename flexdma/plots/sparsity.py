"""Sparsity over training: the share of keys that no query sees, per layer and head."""

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from torch import Tensor

from flexdma import Lifespans
from flexdma.plots.arguments import head_name
from flexdma.plots.colours import series_style


def never_visible(layers: Sequence[Lifespans]) -> Tensor:
    """[layers, H]: the share of keys that no query sees, because they were outranked on arrival.  0 for a sliding window."""
    return torch.stack([(alive.death <= alive.birth).float().mean((0, 2)).cpu() for alive in layers])


def sparsity_figure(steps: Sequence[int], shares: Tensor | Mapping[str, Tensor], *, title: str | None = None) -> Figure:
    """One line per layer and head, one panel per label.

    steps: n training steps.  shares: [n, layers, H], `never_visible` at each step, or {label: such a tensor}.
    """
    panels = shares if isinstance(shares, Mapping) else {"": shares}
    figure = Figure(figsize=(1.2 + 5.2 * len(panels), 4.2), layout="constrained")
    row = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (label, share) in zip(row, panels.items(), strict=True):
        if share.dim() != 3 or len(share) != len(steps):
            raise ValueError(f"shares: expected [{len(steps)}, layers, H] to match steps, got {list(share.shape)}")
        layers, heads = share.shape[1:]
        for index in range(layers * heads):
            layer, head = divmod(index, heads)
            # Wide lines below narrow ones, so that all heads stay visible where they coincide.
            style = {**series_style(index), "linewidth": 1.4 + 5 * (1 - (index + 1) / (layers * heads)) ** 2}
            name = head_name(layer, head, layers=layers)
            axes.plot(list(steps), (100 * share[:, layer, head]).tolist(), label=name, **style)
        axes.set_title(label)
        axes.set_xlabel("training step")
        axes.set_ylim(-3, 103)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=9)
    row[0].set_ylabel("keys that no query sees, %")
    figure.suptitle(title or "Keys that the gates reject on arrival, over training")
    return figure
