"""Hugging Face's Doge, the model of "Trainable Dynamic Mask Sparse Attention" (arXiv 2508.02124), on flexdma.

The layers of transformers build a [B, Hq, Q, K] mask with a top-k per query before they call the attention interface, so the
layers themselves have to change: `use_flexdma` replaces their class by a subclass, which keeps parameters, names and hooks.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import PreTrainedModel
from transformers.models.doge.modeling_doge import DogeAttention, apply_rotary_pos_emb

from flexdma import checks
from flexdma.integrations.transformers.attention import attend
from flexdma.integrations.transformers.cache import given_cache
from flexdma.integrations.transformers.generation import bound_the_cache
from flexdma.integrations.transformers.masks import NAME
from flexdma.integrations.transformers.own_config import own_config
from flexdma.integrations.transformers.packed_positions import find_packed_positions
from flexdma.integrations.transformers.refusals import refuse_other_attention
from flexdma.mixed_precision import without_autocast

Model = TypeVar("Model", bound=PreTrainedModel)


class DogeDynamicMaskAttention(DogeAttention):
    """DogeAttention with the same parameters and projections, and flexdma's operator."""

    lowering: str | None = None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As DogeAttention.forward; attention_mask as `light_mask` makes it."""
        refuse_other_attention(self.config._attn_implementation)
        heads = (-1, self.head_dim)
        query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, heads)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).unflatten(-1, heads)).transpose(1, 2)
        value = self.v_proj(hidden_states).unflatten(-1, heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = given_cache((*args, *kwargs.values()))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        output = attend(
            self, query, key, value, attention_mask, self.gate, cache,
            dropout=self.attention_dropout if self.training else 0.0, scaling=self.scaling,
            options={"window_size": self.keep_window_size, "lowering": self.lowering}, arguments=kwargs,
        )  # fmt: skip
        return self.o_proj(output.flatten(2)), None

    def gate(self, value: Tensor, *, key_padding_mask: Tensor | None = None, **_: Any) -> Tensor:
        """exp(A * softplus(dt_proj(values))): [B, Hkv, K, D] -> [B, Hkv, K], float32 or float64.

        dt_proj runs in the dtype of its parameters, as in transformers.  Later operations run in float32, unlike there.
        """
        if key_padding_mask is not None:  # so that values of masked tokens reach no gradient
            value = value.masked_fill(~key_padding_mask[:, None, :, None], 0.0)
        joined = value.transpose(1, 2).flatten(2)
        with without_autocast(value.device):
            # Contiguous: for a view aten::softplus_backward returns other strides than torch.compile expects (torch 2.13).
            step = self.dt_proj(joined.to(self.A.dtype)).mT.contiguous()
            wide = torch.promote_types(step.dtype, torch.float32)
            return torch.exp(self.A.to(wide)[:, None] * softplus(step.to(wide)))


def use_flexdma(model: Model, *, lowering: str | None = None) -> Model:
    """Compute the attention of a Doge model with flexdma.  Changes the model in place and returns it.

    Parameters, state_dict and saved config stay the same.  `generate` then uses a DynamicMaskCache, and
    `torch.compile(model, fullgraph=True)` works.
    lowering: of the operator, see `dynamic_mask_attention`.
    Raises TypeError where there is no DogeAttention, ValueError where the config also has a sliding window.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    checks.one_of("lowering", lowering, (None, *checks.LOWERINGS))
    layers = [module for module in model.modules() if isinstance(module, DogeAttention)]
    if not layers:
        raise TypeError(f"model: expected a Doge model, got {type(model).__name__}; convert_to_dma is for other models")
    if model.config.sliding_window is not None:
        raise ValueError(
            "config.sliding_window: expected None, as a top-w inside a sliding window lets keys return, "
            f"got {model.config.sliding_window}"
        )
    own_config(model)
    for layer in layers:
        _check_layer(layer)
        layer.__class__ = DogeDynamicMaskAttention
        layer.lowering = lowering
    model.config._attn_implementation = NAME
    bound_the_cache(model)
    find_packed_positions(model)
    return model


def _check_layer(layer: nn.Module) -> None:
    if type(layer) not in (DogeAttention, DogeDynamicMaskAttention):
        raise TypeError(f"model: expected layers of DogeAttention, got its subclass {type(layer).__name__}")
    checks.positive_int("config.keep_window_size", layer.keep_window_size)
