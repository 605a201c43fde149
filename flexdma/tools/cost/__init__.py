"""The cost of Dynamic Mask Attention as sympy formulas: FLOPs, bytes, memory, metadata and communication.

forward, backward       the flex lowering on a whole sequence
decode                  one token against a `DynamicMaskState`
context_parallel        a sequence over ranks, each of which receives bounded states of earlier ranks
full_attention          causal attention to all keys, for comparison
ring_attention, ulysses the same over ranks, by two ways to divide a sequence
visited_blocks          mask blocks that a sliding window visits, exactly
Cost, estimate          the formulas of one call, and its least time by a device's data sheet
DEVICES                 peak rates and bandwidths, with their sources

The symbols are B, Hq, Hkv, N, w, D, Dv, and rows x columns of a mask block; see `symbols.MEANING`.
`flexdma.explain` predicts seconds for given gates on a machine where attention has been timed.
"""

from flexdma.tools.cost_model import symbols
from flexdma.tools.cost_model.calls import Cost, backward, decode, forward, full_attention
from flexdma.tools.cost_model.data_sheets import DEVICES, Device, estimate
from flexdma.tools.cost_model.packed_blocks import causal_blocks, visited_blocks
from flexdma.tools.cost_model.pairs import shown_pairs
from flexdma.tools.cost_model.sequence_parallel import context_parallel, ring_attention, ulysses

__all__ = [
    "DEVICES",
    "Cost",
    "Device",
    "backward",
    "causal_blocks",
    "context_parallel",
    "decode",
    "estimate",
    "forward",
    "full_attention",
    "ring_attention",
    "shown_pairs",
    "symbols",
    "ulysses",
    "visited_blocks",
]
