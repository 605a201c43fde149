"""The masks and metadata of each lowering, without attention."""

import torch
from torch import Tensor

from flexdma import causal_top_w
from flexdma.lowerings.fused_cut import block_size_for
from flexdma.lowerings.living_keys import living_lists
from flexdma.packing.schedule import schedule
from flexdma.tools.shapes import Shape, default_blocks_and_rows


def build_masks(lowering: str, shape: Shape, gate: Tensor, dtype: torch.dtype) -> object:
    """Make lifespans, then the metadata that "flex" or "gather" makes of them in inference with queries of this dtype."""
    alive = causal_top_w(gate, shape.window)
    if lowering == "gather":
        return living_lists(*alive, shape.length, shape.window, block_size_for(alive, shape.length, shape.window))
    block_size, rows = default_blocks_and_rows(shape.forward(), gate.device, dtype)
    return schedule(alive, rows=rows, capacity=shape.window, block_size=block_size, transposed=False)
