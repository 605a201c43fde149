"""Pictures of what was learned: masks, blocks, lifetimes, losses.

Each function returns a Figure and writes nothing.
"""

from collections.abc import Sequence

import torch
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from flexdma import Lifespans
from flexdma.demo.masks import TileMaps, visited

# Okabe and Ito's colours, told apart by every eye; one per model in the order of KINDS.
COLOURS = ("#E69F00", "#0072B2", "#444444", "#009E73")
TILE_COLOURS = ("#F2F2F2", "#56B4E9", "#0B3C6F")
SMOOTHING = 15  # steps


def mask_figure(masks: dict[str, list[Lifespans]], window: int) -> Figure:
    """The mask of each layer and head, query x key, one row per model; lifespans [1, Hkv, N] of each layer."""
    first = next(iter(masks.values()))
    layers, heads, length = len(first), first[0].birth.shape[1], first[0].birth.shape[2]
    columns = layers * heads
    figure = Figure(figsize=(3.1 * columns + 1.2, 3.5 * len(masks) + 0.7), layout="constrained")
    grid = figure.subplots(len(masks), columns, squeeze=False, sharex=True, sharey=True)
    query = torch.arange(length)[:, None]
    image = None
    for row, (label, alive) in zip(grid, masks.items(), strict=True):
        for index, axes in enumerate(row):
            layer, head = divmod(index, heads)
            birth, death = (t[0, head].cpu() for t in alive[layer])
            visible = (query >= birth) & (query < death)
            lifetime = torch.where(visible, (death - birth).float(), torch.nan)
            image = axes.imshow(
                lifetime.numpy(), cmap="plasma_r", norm=LogNorm(1, max(length, 2)), interpolation="nearest"
            )
            axes.set_title(f"{label}\nlayer {layer + 1}, head {head + 1}", fontsize=10)
            axes.set_xlabel("key (position in the text)")
        row[0].set_ylabel("query (position in the text)")
    assert image is not None
    figure.colorbar(image, ax=grid, label="lifetime of the key (queries that see it)", shrink=0.8, aspect=40)
    figure.suptitle(f"Learned masks on validation text: each query (row) sees the {window} keys coloured in its row")
    return figure


def block_figure(tiles: dict[str, tuple[str, TileMaps]], block: int, length: int) -> Figure:
    """Tiles that a kernel visits, before and after packing, one row per model; values: (which head, its tiles)."""
    figure = Figure(figsize=(10.5, 5.2 * len(tiles) + 0.8), layout="constrained")
    grid = figure.subplots(len(tiles), 2, squeeze=False)
    causal = (length // block) * (length // block + 1) // 2
    for row, (label, (head, maps)) in zip(grid, tiles.items(), strict=True):
        for axes, tile_map, order in zip(row, maps, ("natural order", "packed by lifespan"), strict=True):
            count = visited(tile_map)
            axes.imshow(tile_map.numpy(), cmap=ListedColormap(TILE_COLOURS), vmin=0, vmax=2, interpolation="nearest")
            axes.set_title(f"{label}, {head}, {order}:\n{count:,} tiles visited", fontsize=11)
            axes.set_xlabel(f"key block ({block} keys, {order})")
            axes.set_ylabel(f"query block ({block} queries)")
    names = ("skipped", "visited, partly visible", "visited, wholly visible")
    patches = [Patch(facecolor=c, edgecolor="#888888", label=n) for c, n in zip(TILE_COLOURS, names, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Packing makes blocks skippable: {length:,} bytes, {causal:,} causal tiles of {block} x {block}")
    return figure


def lifetime_figure(masks: dict[str, list[Lifespans]], window: int) -> Figure:
    """Histogram of lifetimes, one panel per model, one line per layer and head; lifespans [1, Hkv, N] of each layer."""
    heads, length = next(iter(masks.values()))[0].birth.shape[1:]
    # Keys of the first half have half the text before them to die in: nothing else is cut off by the end.
    born = length // 2
    figure = Figure(figsize=(6 * len(masks), 4.4), layout="constrained")
    panels = figure.subplots(1, len(masks), squeeze=False, sharey=True)[0]
    powers = [0, *(2**n for n in range((born - 1).bit_length()))]
    edges = torch.tensor([*powers, length + 1])
    names = ["0", *(f"{low}+" for low in powers[1:-1]), f"≥ {powers[-1]}"]
    for axes, (label, layers) in zip(panels, masks.items(), strict=True):
        for index in range(len(layers) * heads):
            layer, head = divmod(index, heads)
            lifetime = (layers[layer].death - layers[layer].birth)[0, head, :born].cpu()
            share = torch.histogram(lifetime.float(), bins=edges.float()).hist / born
            offset = (index + 0.5) / (len(layers) * heads) - 0.5
            axes.bar(
                (torch.arange(len(share)) + 0.8 * offset).numpy(),
                share.numpy(),
                width=0.8 / (len(layers) * heads),
                color=COLOURS[index % 4],
                label=f"layer {layer + 1}, head {head + 1}",
            )
        # Logarithmic: the few keys that live long are what selection is about.
        axes.set_yscale("log")
        axes.set_ylim(0.5 / born, 1.5)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.axvline(_bin(edges, window), color="#999999", linestyle="--", linewidth=1, label=f"w = {window}")
        axes.set_title(label)
        axes.set_xlabel("lifetime of a key, in queries (0: never visible)")
        axes.legend(fontsize=9)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("share of keys")
    figure.suptitle(f"How long keys stay visible, over {length:,} bytes of validation text")
    return figure


def loss_figure(losses: dict[str, Sequence[float]], validation: dict[str, float], baseline: str) -> Figure:
    """Left the training losses; right how far each is from that of the model labelled `baseline`, batch by batch."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    smooth = {label: _smoothed(torch.tensor(values)) for label, values in losses.items()}
    steps = range(1, len(smooth[baseline]) + 1)
    gaps = {label: values - smooth[baseline] for label, values in smooth.items()}
    # Wide lines below narrow ones: curves that coincide all stay visible.
    for colour, width, label in zip(COLOURS, (2.0, 5.0, 2.5, 1.2), smooth, strict=True):
        style = {"color": colour, "linewidth": width}
        left.plot(steps, smooth[label].tolist(), label=f"{label}: {validation[label]:.3f}", **style)
        right.plot(steps, gaps[label].tolist(), **style)
    left.set_ylabel(f"training loss, bits per byte (mean of {SMOOTHING} steps)")
    left.set_title("Training loss")
    left.legend(title="validation, bits per byte")
    # Without the model that is furthest away, which the left panel shows well enough.
    near = sorted(gaps.values(), key=lambda gap: gap.abs().max().item())[:-1]
    reach = 1.2 * max(0.01, *(gap.abs().max().item() for gap in near))
    right.set_ylim(-reach, reach)
    right.set_ylabel(f"bits per byte more than {baseline}")
    right.set_title(f"The same, less the loss of {baseline} on the same batches")
    for axes in (left, right):
        axes.set_xlabel("training step")
        axes.grid(alpha=0.25)
    return figure


def _smoothed(values: Tensor) -> Tensor:
    """Each value's mean with up to SMOOTHING - 1 before it."""
    total = torch.cat([values.new_zeros(1), values.cumsum(0)])
    end = torch.arange(1, len(values) + 1)
    start = (end - SMOOTHING).clamp(min=0)
    return (total[end] - total[start]) / (end - start)


def _bin(edges: Tensor, value: int) -> int:
    return int(torch.bucketize(value, edges, right=True)) - 1
