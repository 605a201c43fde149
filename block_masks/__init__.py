"""mask_mod and BlockMask recipes for plain FlexAttention."""

from flexdma.block_masks.document import document_mask_mod
from flexdma.block_masks.dynamic import dynamic_block_mask
from flexdma.block_masks.lifespan import lifespan_block_mask, lifespan_mask_mod
from flexdma.block_masks.sink import sink_mask_mod
from flexdma.block_masks.sliding_window import sliding_window_mask_mod

__all__ = [
    "document_mask_mod",
    "dynamic_block_mask",
    "lifespan_block_mask",
    "lifespan_mask_mod",
    "sink_mask_mod",
    "sliding_window_mask_mod",
]
