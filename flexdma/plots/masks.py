"""The mask, query x key, coloured by the lifetime of each key."""

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from flexdma.plots.arguments import Layers, head_name, labelled_layers, one_head


def mask_figure(lifespans: Layers, *, batch: int = 0, title: str | None = None) -> Figure:
    """The mask of each layer and head, one column each; one row per label.

    lifespans: [B, H, K] of one layer, a list of layers, or {label: layers}.  Drawn densely, so for K up to a few thousand.
    """
    rows = labelled_layers(lifespans)
    first = next(iter(rows.values()))
    layers, (heads, length) = len(first), first[0].birth.shape[1:]
    columns = layers * heads
    figure = Figure(figsize=(3.1 * columns + 1.6, 3.4 * len(rows) + 0.8), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, sharex=True, sharey=True)
    query = torch.arange(length, device="cpu")[:, None]
    image = None
    for row, (label, alive) in zip(grid, rows.items(), strict=True):
        for index, axes in enumerate(row):
            layer, head = divmod(index, heads)
            birth, death = one_head(alive[layer], batch, head)
            visible = (query >= birth) & (query < death)
            lifetime = torch.where(visible, (death - birth).float(), torch.nan)
            image = axes.imshow(
                lifetime.numpy(), cmap="plasma_r", norm=LogNorm(1, max(length, 2)), interpolation="nearest"
            )
            name = head_name(layer, head, layers=layers)
            axes.set_title(f"{label}\n{name}" if label else name, fontsize=10)
            axes.set_xlabel("key (position in the text)")
        row[0].set_ylabel("query (position in the text)")
    assert image is not None
    figure.colorbar(image, ax=grid, label="lifetime of the key (queries that see it)", shrink=0.8, aspect=40)
    figure.suptitle(title or "Which keys (across) each query (down) sees: those coloured in its row", wrap=True)
    return figure
