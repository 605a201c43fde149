"""The masks and metadata of each lowering, without attention."""

from torch import Tensor

from flexdma import causal_top_w
from flexdma.lowerings.default_options import default_block_size
from flexdma.lowerings.fused_cut import block_size_for
from flexdma.lowerings.living_keys import living_lists
from flexdma.packing.rows import FoldedRows
from flexdma.packing.schedule import schedule
from flexdma.tools.shapes import Shape


def build_masks(lowering: str, shape: Shape, gate: Tensor) -> object:
    """Make lifespans, then the metadata that "flex" or "gather" makes of them in inference."""
    alive = causal_top_w(gate, shape.window)
    if lowering == "gather":
        return living_lists(*alive, shape.length, shape.window, block_size_for(alive, shape.length, shape.window))
    block_size = default_block_size(gate.device.type)
    rows = FoldedRows.of(shape.length, shape.group, block_size[0], gate.device.type)
    return schedule(alive, rows=rows, capacity=shape.window, block_size=block_size, transposed=False)
