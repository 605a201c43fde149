"""flexdma: Dynamic Mask Attention as a compiler-lowered operator (arXiv 2508.02124).

dynamic_mask_attention      the operator
DynamicMaskAttention        the layer around it; ValueGate, its gate
causal_top_w, ...           gates -> Lifespans, the mask as one interval per key
flexdma.score_mods          score_mod recipes for plain FlexAttention
flexdma.block_masks         mask_mod and BlockMask recipes
flexdma.reference           the specification, dense
"""

from flexdma._version import __version__
from flexdma.attention import dynamic_mask_attention
from flexdma.gates import ValueGate
from flexdma.lifespans import Lifespans, above_threshold, causal_top_w, global_top_w, sliding_window
from flexdma.lowerings.choice import choose_lowering
from flexdma.modules import DynamicMaskAttention
from flexdma.packing import pack

__all__ = [
    "DynamicMaskAttention",
    "Lifespans",
    "ValueGate",
    "__version__",
    "above_threshold",
    "causal_top_w",
    "choose_lowering",
    "dynamic_mask_attention",
    "global_top_w",
    "pack",
    "sliding_window",
]
