"""The blocks that a kernel visits, before and after packing.  Partial blocks need the mask, full ones do not."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from flexdma import Lifespans
from flexdma.packing.block_index import BlockIndex, block_index
from flexdma.packing.rows import FoldedRows
from flexdma.packing.schedule import schedule
from flexdma.plots.arguments import one_head
from flexdma.plots.colours import TILES
from flexdma.rounding import ceil_div

SKIPPED, PARTIAL, FULL = 0, 1, 2  # values of a tile map


class TileMaps(NamedTuple):
    """SKIPPED, PARTIAL or FULL for each tile [query blocks, key blocks] of one head, with keys in two orders."""

    natural: Tensor
    packed: Tensor


def tile_maps(lifespans: Lifespans, window_size: int, block: int) -> TileMaps:
    """The tiles that a kernel visits for one head.

    lifespans: birth, death [K].  window_size: upper bound on the keys that one query sees.
    """
    one = Lifespans(*(t.view(1, 1, -1).cpu() for t in lifespans))
    rows = FoldedRows(one.birth.shape[-1], group=1)
    natural = block_index(*one, rows=rows, block_size=(block, block))
    _, packed = schedule(one, rows=rows, capacity=window_size, block_size=(block, block), transposed=False)
    return TileMaps(_tile_map(natural), _tile_map(packed))


def visited(tiles: Tensor) -> int:
    """The number of tiles that a kernel computes."""
    return int((tiles != SKIPPED).sum())


def block_figure(
    lifespans: Lifespans | Mapping[str, Lifespans],
    *,
    window_size: int,
    block_size: int = 128,
    batch: int = 0,
    head: int = 0,
    title: str | None = None,
    colours: Sequence[str] = TILES,
) -> Figure:
    """The tiles visited with keys in natural order (left) and packed (right); one row per label.

    lifespans: [K], or [B, H, K] of which `batch` and `head` are drawn, or {label: one of these}.
    colours: of skipped, partial and full tiles.
    """
    rows = lifespans if isinstance(lifespans, Mapping) else {"": lifespans}
    figure = Figure(figsize=(10.5, 5.2 * len(rows) + 0.8))
    figure.set_layout_engine("constrained", h_pad=0.1)
    grid = figure.subplots(len(rows), 2, squeeze=False)
    length = 0
    for row, (label, alive) in zip(grid, rows.items(), strict=True):
        one = one_head(alive, batch, head)
        length = len(one.birth)
        maps = tile_maps(one, window_size, block_size)
        for axes, tiles, order in zip(row, maps, ("natural order", "packed by lifespan"), strict=True):
            full = int((tiles == FULL).sum())
            axes.imshow(tiles.numpy(), cmap=ListedColormap(colours), vmin=0, vmax=2, interpolation="nearest")
            name = f"{label}, {order}" if label else order
            axes.set_title(f"{name}:\n{visited(tiles):,} tiles visited, {full:,} of them full", fontsize=11)
            axes.set_xlabel(f"key block ({block_size} keys, {order})")
            axes.set_ylabel(f"query block ({block_size} queries)")
    names = ("skipped", "partial: visited, some pairs masked", "full: visited, no mask needed")
    patches = [Patch(facecolor=c, edgecolor="#888888", label=n) for c, n in zip(colours, names, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    blocks = ceil_div(length, block_size)
    counted = f"{length:,} keys, {blocks * (blocks + 1) // 2:,} causal tiles of {block_size} x {block_size}"
    figure.suptitle(title or f"Packing makes blocks skippable: {counted}")
    return figure


def _tile_map(index: BlockIndex) -> Tensor:
    """[query blocks, key blocks] of the first head."""
    number, indices, full_number, full_indices = (t[0, 0].long() for t in index.tensors())
    tiles = torch.full(indices.shape, SKIPPED, device=indices.device)
    for count, visited, mark in ((number, indices, PARTIAL), (full_number, full_indices, FULL)):
        row, place = (torch.arange(indices.shape[-1], device=indices.device) < count[:, None]).nonzero(as_tuple=True)
        tiles[row, visited[row, place]] = mark
    return tiles
