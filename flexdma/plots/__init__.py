"""Pictures of dynamic masks, with matplotlib (`pip install flexdma[plot]`).

Each function takes lifespans or gates and returns a matplotlib Figure.  None of them writes a file, opens a window or uses
pyplot, so they work without a display: `mask_figure(lifespans).savefig("mask.png")`.

mask_figure        the mask, query x key
block_figure       the blocks that a kernel visits, before and after packing, partial and full
lifespan_figure    one horizontal line per key, from birth to death
lifetime_figure    histogram of the lifetimes of keys
gate_figure        gates along a text, with its tokens
sparsity_figure    the share of keys that no query sees, per layer and head, over training
loss_figure        losses over training, and their difference to those of one model
scaling_figure     time against length and window, from benchmark results
"""

import importlib.util

if importlib.util.find_spec("matplotlib") is None:
    raise ImportError("flexdma.plots needs matplotlib: pip install flexdma[plot]", name="matplotlib")

from flexdma.plots.blocks import TileMaps, block_figure, tile_maps, visited
from flexdma.plots.gates import gate_figure
from flexdma.plots.lifespans import lifespan_figure, lifetime_figure
from flexdma.plots.losses import loss_figure
from flexdma.plots.masks import mask_figure
from flexdma.plots.scaling import scaling_figure
from flexdma.plots.sparsity import never_visible, sparsity_figure

__all__ = [
    "TileMaps",
    "block_figure",
    "gate_figure",
    "lifespan_figure",
    "lifetime_figure",
    "loss_figure",
    "mask_figure",
    "never_visible",
    "scaling_figure",
    "sparsity_figure",
    "tile_maps",
    "visited",
]
