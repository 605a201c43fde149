"""A pass of a model with its full attention, in which a function sees what each attention layer computes with."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from flexdma.integrations.transformers.attention import PLAIN, attend
from flexdma.integrations.transformers.falcon import rerouted
from flexdma.integrations.transformers.masks import FULL, light_mask
from flexdma.integrations.transformers.packed_positions import POSITION_DOCUMENTS


@dataclass(frozen=True)
class ObservedAttention:
    """One call of a layer's attention.

    layer: the attention module.  query [B, Hq, N, D], key [B, Hkv, N, D] and value [B, Hkv, N, Dv], positions encoded.
    scaling: of the logits; None = D ** -0.5.  arguments: the layer's others, such as `softcap`.
    window: keys that a query sees at most, those of a sliding window of the model's own, or all N.
    """

    layer: Any
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float | None
    arguments: dict[str, Any]
    window: int


Observer = Callable[[ObservedAttention], None]
_active: ContextVar[tuple[Observer, Mapping[nn.Module, int]]] = ContextVar("flexdma_full_attention")


@contextmanager
def full_attention(
    model: PreTrainedModel, observer: Observer, own_windows: Mapping[nn.Module, int] | None = None
) -> Iterator[None]:
    """While active, the model computes full attention, and calls `observer` before that of each layer.

    model: one that `convert_to_dma` takes, or that it made, whose gates are then not used.  Without caches (use_cache=False).
    own_windows: sliding windows of the model's own, by layer.
    """
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    with ExitStack() as stack:
        stack.enter_context(rerouted(model))
        stack.callback(_active.reset, _active.set((observer, own_windows or {})))
        for config in configs:
            stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = FULL
        yield


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    dynamic_mask_cache: object = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """The attention interface: PyTorch's attention, or a window by equal gates, as long as the text or the model's own."""
    observer, own_windows = _active.get()
    window = min(key.shape[2], own_windows.get(module, key.shape[2]))
    observer(ObservedAttention(module, query, key, value, scaling, arguments, window))
    is_plain = attention_mask is None and not dropout and dynamic_mask_cache is None and window == key.shape[2]
    if is_plain and _is_one_text(arguments) and _has_groups(module, query, key):
        # What the model computes with attn_implementation="sdpa", bit for bit.
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
    options = {"window_size": window, "sinks": 0, "recent": 0, "lowering": None}
    output = attend(
        module, query, key, value, attention_mask, _equal_gates, dynamic_mask_cache, dropout=dropout, scaling=scaling,
        options=options, arguments=arguments,
    )  # fmt: skip
    return output, None


def _is_one_text(arguments: Mapping[str, Any]) -> bool:
    """Whether no argument of a layer changes attention, and the hook of a converted model found no packed sequences."""
    given = {name for name, value in arguments.items() if value is not None}
    return POSITION_DOCUMENTS in arguments and POSITION_DOCUMENTS not in given and given <= PLAIN


def _has_groups(module: Any, query: Tensor, key: Tensor) -> bool:
    """Whether transformers' function for PyTorch's attention knows how many query heads read a key."""
    return getattr(module, "num_key_value_groups", 1) == query.shape[1] // key.shape[1]


def _equal_gates(value: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
    return torch.zeros(value.shape[:3], device=value.device)


AttentionInterface.register(FULL, _attention)
AttentionMaskInterface.register(FULL, light_mask)
