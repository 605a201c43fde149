"""A pass of a model with its full attention, in which a function sees what each attention layer computes with."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from flexdma.integrations.transformers.attention import attend
from flexdma.integrations.transformers.falcon import rerouted
from flexdma.integrations.transformers.masks import FULL, light_mask


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
    """The attention interface: with equal gates a window as long as the text is full attention."""
    observer, own_windows = _active.get()
    window = min(key.shape[2], own_windows.get(module, key.shape[2]))
    observer(ObservedAttention(module, query, key, value, scaling, arguments, window))
    options = {"window_size": window, "sinks": 0, "recent": 0, "lowering": None}
    output = attend(
        module, query, key, value, attention_mask, _equal_gates, dynamic_mask_cache, dropout=dropout, scaling=scaling,
        options=options, arguments=arguments,
    )  # fmt: skip
    return output, None


def _equal_gates(value: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
    return torch.zeros(value.shape[:3], device=value.device)


AttentionInterface.register(FULL, _attention)
AttentionMaskInterface.register(FULL, light_mask)
