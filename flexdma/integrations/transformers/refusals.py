"""Refusals of arguments and caches that these integrations do not compute.  Each names the argument."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from flexdma.integrations.transformers.cache import DynamicMaskCache
from flexdma.integrations.transformers.masks import NAME
from flexdma.lowerings.choice import choose_lowering

# Argument of an attention layer -> reason for the refusal.  None and False are accepted.
REFUSED = {
    "output_attentions": "attention weights are never computed",
    "head_mask": "heads are not masked",
    "position_bias": "there is no position bias",
}


def refuse_arguments(module: nn.Module, dropout: float, arguments: dict[str, Any]) -> None:
    """Raise ValueError for an argument of the layer that needs attention weights or changes attention."""
    if dropout:
        names = (name for name, value in vars(module.config).items() if value == dropout)
        name = next((name for name in names if "att" in name and "drop" in name), "attention_dropout")
        raise ValueError(f"{name}: expected 0 in training, got {dropout}")
    for name, why in REFUSED.items():
        value = arguments.get(name)
        if value is not None and value is not False:
            raise ValueError(f"{name}: expected None, as {why}, got {_text(value)}")
    if getattr(module.config, "output_attentions", False):
        raise ValueError("config.output_attentions: expected False, as attention weights are never computed, got True")
    if arguments.get("is_causal") is False:
        raise ValueError("is_causal: expected True, got False")


def refuse_other_attention(implementation: object) -> None:
    """Raise ValueError unless it is None or flexdma's, because another one has no gates."""
    if implementation not in (None, NAME):
        raise ValueError(f"attn_implementation: expected None or {NAME!r}, got {implementation!r}")


def refuse_cache_kind(cache: object) -> None:
    """Raise TypeError unless the cache is a DynamicMaskCache or a DynamicCache, which returns every key."""
    if not isinstance(cache, DynamicMaskCache | DynamicCache):
        raise TypeError(f"cache: expected DynamicMaskCache or DynamicCache, got {type(cache).__name__}")


def refuse_cache(cache: Any, layer: int, keys: int) -> None:
    """Raise unless the cache is a DynamicMaskCache, or returned all keys, `keys` of them, in its last update."""
    if cache is None or isinstance(cache, DynamicMaskCache):
        return
    refuse_cache_kind(cache)
    if layer >= len(cache.layers):
        raise ValueError(f"cache: expected one that the layer updates, got one without layer {layer}")
    kind = type(cache.layers[layer])
    if kind not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise TypeError(f"cache: expected layers of DynamicLayer, got a {kind.__name__}")
    seen = cache.get_seq_length(layer)
    if seen != keys:
        raise ValueError(
            f"cache: expected all {seen} keys, got {keys}: the model's own sliding-window cache has dropped keys "
            "that may be selected again; use DynamicMaskCache"
        )


def refuse_traced_cache(cache: object, query: Tensor, lowering: str | None) -> None:
    """Raise ValueError for a DynamicCache in a traced call of FlexAttention; usually the forward pass itself made it.

    torch 2.13 loses writes to an object made in the graph after a higher-order operator, so the cache would keep old keys.
    """
    if not torch.compiler.is_compiling() or not isinstance(cache, DynamicCache):
        return
    if (lowering or choose_lowering(query.device.type, query.dtype)) == "flex":
        raise ValueError(
            "use_cache: expected False, or a DynamicMaskCache, in a compiled forward pass; got a DynamicCache"
        )


def _text(value: object) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
