"""Falcon layers that call the attention interface, with the same parameters; transformers' own compute scores themselves.

Key and value heads of the new architecture stay grouped; the layer of transformers repeats them for each query head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from flexdma.integrations.transformers.cache import given_cache


class FalconInterfaceAttention(FalconAttention):
    """FalconAttention that calls the attention interface and caches keys and values per KV head."""

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        alibi: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As FalconAttention.forward, without its attention dropout, which applies only with ALiBi."""
        query, key, value = (heads.transpose(1, 2) for heads in self._heads(hidden_states))
        if alibi is not None:
            kwargs["alibi"] = alibi
        elif position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        # A converted layer gets its cache twice: a hook adds it as `dynamic_mask_cache` for the attention interface.
        cache = given_cache((*args, *(argument for name, argument in kwargs.items() if name != "dynamic_mask_cache")))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        named = {
            name: argument for name, argument in kwargs.items() if argument is not cache or name == "dynamic_mask_cache"
        }
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output, _ = attend(self, query, key, value, attention_mask, scaling=self.inv_norm_factor, dropout=0.0, **named)
        return self.dense(output.flatten(2)), None

    def _heads(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, N, Hq, D], key and value [B, N, Hkv, D]."""
        joined = self.query_key_value(hidden_states)
        if not self.new_decoder_architecture:
            return self._split_heads(joined)
        groups = joined.unflatten(-1, (self.num_kv_heads, -1, self.head_dim))
        return groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]


# Attention layers that compute scores themselves -> the class that calls the attention interface.
REROUTED: dict[type, type] = {FalconAttention: FalconInterfaceAttention}


def reroute(layer: nn.Module) -> None:
    """Make a layer of REROUTED call the attention interface.  Other layers stay unchanged."""
    layer.__class__ = REROUTED.get(type(layer), type(layer))


@contextmanager
def rerouted(model: nn.Module) -> Iterator[None]:
    """While active, layers that compute scores themselves call the attention interface."""
    before = [(module, type(module)) for module in model.modules() if type(module) in REROUTED]
    try:
        for layer, _ in before:
            reroute(layer)
        yield
    finally:
        for layer, kind in before:
            layer.__class__ = kind
