"""mask_mod and BlockMask recipes for plain FlexAttention."""

from flexdma.block_masks.biformer import biformer_block_mask, biformer_order
from flexdma.block_masks.document import document_mask_mod
from flexdma.block_masks.dynamic import dynamic_block_mask
from flexdma.block_masks.hax import HaxMask, hax_block_mask, hax_buckets
from flexdma.block_masks.lifespan import lifespan_block_mask, lifespan_mask_mod
from flexdma.block_masks.moba import moba_block_mask
from flexdma.block_masks.nsa import nsa_block_mask, nsa_selection
from flexdma.block_masks.routed import routed_block_mask, routed_mask_mod
from flexdma.block_masks.seer import SeerGate, seer_block_mask, seer_loss, seer_target
from flexdma.block_masks.sink import sink_mask_mod
from flexdma.block_masks.sliding_window import sliding_window_mask_mod

__all__ = [
    "HaxMask",
    "SeerGate",
    "biformer_block_mask",
    "biformer_order",
    "document_mask_mod",
    "dynamic_block_mask",
    "hax_block_mask",
    "hax_buckets",
    "lifespan_block_mask",
    "lifespan_mask_mod",
    "moba_block_mask",
    "nsa_block_mask",
    "nsa_selection",
    "routed_block_mask",
    "routed_mask_mod",
    "seer_block_mask",
    "seer_loss",
    "seer_target",
    "sink_mask_mod",
    "sliding_window_mask_mod",
]
