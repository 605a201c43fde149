"""Dynamic Mask Attention in every attention of a torchtitan model's config."""

from dataclasses import dataclass, replace

from torchtitan.models.common.attention import BaseAttention, GQAttention, VarlenAttention
from torchtitan.protocols.model import ModelConfigConverter
from torchtitan.protocols.module import Module

from flexdma.integrations.torchtitan.inner_attention import DynamicMaskInnerAttention

FULL = (-1, 0)  # the window of full causal attention


class DynamicMaskConverter(ModelConfigConverter):
    """Replaces the inner attention of each `GQAttention` in a model's config.

    As an argument of torchtitan's model registries: `converters=[DynamicMaskConverter.Config(inner_attention=...)]`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ModelConfigConverter.Config):
        """inner_attention: for all layers; each gets the number of KV heads and the head size of its attention."""

        inner_attention: DynamicMaskInnerAttention.Config

    def __init__(self, config: Config) -> None:
        self.inner_attention = config.inner_attention

    def convert(self, model_config: Module.Config) -> Module.Config:
        """Change the config in place and return it.

        Raises ValueError where an attention is not a `GQAttention` or has a sliding window, or where there is none.
        """
        attentions = list(model_config.traverse(BaseAttention.Config))
        for name, attention, _, _ in attentions:
            _check(name, attention)
        if not attentions:
            raise ValueError("model_config: expected attentions in it, got none")
        for _, attention, _, _ in attentions:
            inner = replace(
                self.inner_attention,
                n_kv_heads=attention.n_kv_heads or attention.n_heads,
                head_dim=attention.head_dim or attention.dim // attention.n_heads,
            )
            inner.sharding_config = attention.inner_attention.sharding_config
            attention.inner_attention = inner
        return model_config


def _check(name: str, attention: BaseAttention.Config) -> None:
    if not isinstance(attention, GQAttention.Config):
        raise ValueError(f"{name}: expected a GQAttention, got {type(attention).__qualname__.removesuffix('.Config')}")
    inner = attention.inner_attention
    window = inner.window_size if type(inner) is VarlenAttention.Config else FULL
    if window != FULL:
        raise ValueError(f"{name}.inner_attention: expected full causal attention, got window_size={window}")
