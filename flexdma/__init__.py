"""flexdma: Dynamic Mask Attention as a compiler-lowered operator (arXiv 2508.02124).

dynamic_mask_attention      the operator
DynamicMaskAttention        the layer around it; ValueGate, its gate
causal_top_w, ...           gates -> Lifespans, the mask as one interval per key
flexdma.score_mods          score_mod recipes for plain FlexAttention
flexdma.block_masks         mask_mod and BlockMask recipes
flexdma.reference           the specification, dense
inspect_kernels             what the compiler generates for a call, on any machine
"""

from typing import TYPE_CHECKING, Any

from flexdma._version import __version__
from flexdma.attention import dynamic_mask_attention
from flexdma.gates import ValueGate
from flexdma.lifespans import Lifespans, above_threshold, causal_top_w, global_top_w, sliding_window
from flexdma.lowerings.choice import choose_lowering
from flexdma.modules import DynamicMaskAttention
from flexdma.packing import pack

if TYPE_CHECKING:
    from flexdma.inspection import inspect_kernels

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
    "inspect_kernels",
    "pack",
    "sliding_window",
]


def __getattr__(name: str) -> Any:
    # Looks into Inductor, which takes a second to import.
    if name == "inspect_kernels":
        from flexdma.inspection import inspect_kernels

        return inspect_kernels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
