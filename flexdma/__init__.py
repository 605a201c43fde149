"""flexdma: Dynamic Mask Attention as a compiler-lowered operator (arXiv 2508.02124).

dynamic_mask_attention      attention to the keys that gates select
dynamic_mask_attention_varlen   the same over sequences packed into one row, in flash-attention's layout
lifespan_attention          attention over any lifespans; dynamic_mask_attention is built on it
attention_mass              how much attention each key receives
DynamicMaskAttention        the layer around the operator; ValueGate is its gate
DynamicMaskLatentAttention  the same over latents of tokens, from which heads compute keys and values
DynamicMaskState            the keys that later queries can see: decoding, chunked prefill, endless context
growing_attention           the same for keys that no window bounds, in a GrowingState
causal_top_w, ...           gates -> Lifespans, the mask as one interval per key
flexdma.policies            Lifespans by the rules of other systems: DMS, FoX, SnapKV, H2O, TRIM-KV and others
flexdma.score_mods          score_mod recipes for plain FlexAttention
flexdma.block_masks         mask_mod and BlockMask recipes
flexdma.reference           the specification, dense
save_states, load_states    states as safetensors files
inspect_kernels             the kernels that the compiler generates for a call, on any machine
explain                     what a gate selects, what that costs, and whether it pays
doctor                      graph breaks, recompilations and fallbacks of a model call
flexdma.integrations        transformers: Doge, and gates for other decoders
"""

import importlib
from typing import TYPE_CHECKING, Any

from flexdma._version import __version__
from flexdma.annealing import annealed_window
from flexdma.attention import dynamic_mask_attention
from flexdma.gates import ValueGate
from flexdma.growing import growing_attention
from flexdma.latent import DynamicMaskLatentAttention
from flexdma.lifespans import Lifespans, above_threshold, causal_top_w, global_top_w, sliding_window
from flexdma.lowerings.choice import choose_lowering
from flexdma.mass import attention_mass
from flexdma.modules import DynamicMaskAttention
from flexdma.operator import lifespan_attention
from flexdma.packing import pack, packed_layout
from flexdma.state import DynamicMaskState, GrowingState, State, load_states, save_states
from flexdma.varlen import dynamic_mask_attention_varlen

if TYPE_CHECKING:
    from flexdma.tools.doctor import doctor
    from flexdma.tools.explain import explain
    from flexdma.tools.inspect import inspect_kernels

__all__ = [
    "DynamicMaskAttention",
    "DynamicMaskLatentAttention",
    "DynamicMaskState",
    "GrowingState",
    "Lifespans",
    "State",
    "ValueGate",
    "__version__",
    "above_threshold",
    "annealed_window",
    "attention_mass",
    "causal_top_w",
    "choose_lowering",
    "doctor",
    "dynamic_mask_attention",
    "dynamic_mask_attention_varlen",
    "explain",
    "global_top_w",
    "growing_attention",
    "inspect_kernels",
    "lifespan_attention",
    "load_states",
    "pack",
    "packed_layout",
    "save_states",
    "sliding_window",
]


# Name -> (module, its attribute; None = the module itself).  Tools are above the core and are imported when first used.
_TOOLS = {
    "cost": ("flexdma.tools.cost", None),
    "doctor": ("flexdma.tools.doctor", "doctor"),
    "explain": ("flexdma.tools.explain", "explain"),
    "inspect_kernels": ("flexdma.tools.inspect", "inspect_kernels"),
}


def __getattr__(name: str) -> Any:
    if name not in _TOOLS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _TOOLS[name]
    found = importlib.import_module(module)
    return found if attribute is None else getattr(found, attribute)
