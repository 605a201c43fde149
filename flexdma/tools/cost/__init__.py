"""What Dynamic Mask Attention costs, as formulas: FLOPs, bytes, memory, metadata and communication, in sympy.

forward, backward       the flex lowering on a whole sequence
decode                  one token against a `DynamicMaskState`
context_parallel        a sequence over ranks, each of which receives w keys per KV head (a model: flexdma has no such code)
full_attention          causal attention to everything, to compare with
visited_blocks          mask blocks that a sliding window visits, exactly
Cost, estimate          the formulas of one call, and the least time that a device's data sheet allows it
DEVICES                 peak rates and bandwidths, with their sources

Sizes are the field's: B, Hq, Hkv, N, w, D, Dv, and `block`s of rows x columns; see `symbols.MEANING`.
`flexdma.explain` answers another question: seconds on a machine where attention has been timed, for given gates.
"""

from flexdma.tools.cost_model import symbols
from flexdma.tools.cost_model.calls import Cost, backward, context_parallel, decode, forward, full_attention
from flexdma.tools.cost_model.data_sheets import DEVICES, Device, estimate
from flexdma.tools.cost_model.packed_blocks import causal_blocks, visited_blocks
from flexdma.tools.cost_model.pairs import shown_pairs

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
    "shown_pairs",
    "symbols",
    "visited_blocks",
]
