"""Any decoder with grouped-query attention, given the gates of Dynamic Mask Attention (arXiv 2508.02124) to train on.

A new gate is constant (A = 0), and of equal gates the newest win: the converted model starts as the old one with a sliding
window of w, which is the old one itself while the context is not longer than w.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from flexdma import checks
from flexdma.gates import FORMS, RECENCIES, ValueGate
from flexdma.integrations.transformers.cache import given_cache
from flexdma.integrations.transformers.generation import bound_the_cache
from flexdma.integrations.transformers.masks import NAME

Model = TypeVar("Model", bound=PreTrainedModel)
# What an attention layer that calls the attention interface has.
LAYER_ATTRIBUTES = ("layer_idx", "scaling", "head_dim", "num_key_value_groups")
LAYER_TYPES = {"full_attention", "sliding_attention"}
# Layers that call the attention interface twice per forward pass, with parts of the values: a key would have two gates.
TWICE = {"DiffLlamaAttention"}


def convert_to_dma(
    model: Model,
    window_size: int,
    *,
    form: str = "exp",
    recency: str | None = None,
    slopes: Sequence[float] | None = None,
    sinks: int = 0,
    recent: int = 0,
    lowering: str | None = None,
) -> Model:
    """Give every attention layer a `value_gate` (a `ValueGate`) and compute it with flexdma; in place, and returned.

    model: a decoder of transformers (Llama, Qwen, Mistral, ...); its weights and their names stay as they are.
    window_size: w.  Where the model has sliding windows, at most as long as they are: w takes their place.
    form, recency: the gate's.  slopes: with recency="slope" the Hkv initial slopes; default 0, which starts as no recency.
    sinks, recent, lowering: the operator's.

    The start is exactly a sliding window of w, with `sinks` more keys if any, for recency None and "slope".  With "forget"
    that window starts with a decay of 0.05 logits per token in it, the same for all tokens.
    The choice is written to `model.config.flexdma`, from which `flexdma.integrations.transformers.from_pretrained` rebuilds
    it; a converted model is left as it is, with the same arguments.
    Gates are float32 whatever the model's dtype: small steps of A would vanish in bfloat16.
    Raises TypeError or ValueError naming what the model has that is not supported.
    """
    choice = {"window_size": window_size, "form": form, "recency": recency, "sinks": sinks, "recent": recent}
    _check_choice(choice, lowering)
    layers = _attention_layers(model)
    config = model.config.get_text_config(decoder=True)
    _check_model(model, config, window_size)
    for layer in layers:
        heads = config.num_key_value_heads
        start = [0.0] * heads if recency == "slope" and slopes is None else slopes
        weight = next(layer.parameters())
        with torch.device(weight.device):
            layer.value_gate = ValueGate(heads, layer.head_dim, form, recency, slopes=start)
        if recency == "forget":
            nn.init.zeros_(layer.value_gate.forget_proj.weight)  # one decay for all tokens, until trained
        layer.value_gate.train(layer.training)
        layer.dynamic_mask_options = {
            "window_size": window_size, "sinks": sinks, "recent": recent, "lowering": lowering
        }  # fmt: skip
        layer.register_forward_pre_hook(_show_the_cache, with_kwargs=True)
    config._attn_implementation = NAME
    model.config.flexdma = choice
    bound_the_cache(model)
    return model


def _show_the_cache(layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The layer passes unknown arguments on to the attention interface, which otherwise would not see the cache."""
    if layer.config._attn_implementation != NAME:
        raise ValueError(
            f"attn_implementation: expected {NAME!r} for a converted model, got {layer.config._attn_implementation!r}, "
            "which has no gates"
        )
    return args, {**kwargs, "dynamic_mask_cache": given_cache((*args, *kwargs.values()))}


def _check_choice(choice: dict[str, Any], lowering: str | None) -> None:
    checks.positive_int("window_size", choice["window_size"])
    checks.one_of("form", choice["form"], FORMS)
    checks.one_of("recency", choice["recency"], RECENCIES)
    checks.positive_int("sinks", choice["sinks"], 0)
    checks.positive_int("recent", choice["recent"], 0)
    checks.one_of("lowering", lowering, (None, *checks.LOWERINGS))


def _attention_layers(model: PreTrainedModel) -> list[Any]:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    layers = [m for m in model.modules() if all(hasattr(m, name) for name in LAYER_ATTRIBUTES)]
    if any(hasattr(layer, "keep_window_size") for layer in layers):
        raise TypeError(f"model: expected a model without gates, got {type(model).__name__}; use_flexdma is for Doge")
    if any(hasattr(layer, "value_gate") for layer in layers):
        raise ValueError(f"model: expected one not yet converted, got {getattr(model.config, 'flexdma', None)}")
    if not layers or not model._supports_attention_backend:
        raise TypeError(
            f"model: expected attention layers that call the attention interface, got {type(model).__name__}"
        )
    for name in TWICE.intersection(parent.__name__ for layer in layers for parent in type(layer).__mro__):
        raise TypeError(
            f"model: expected layers that call the attention interface once, got {name}, which calls it twice"
        )
    return layers


def _check_model(model: PreTrainedModel, config: Any, window_size: int) -> None:
    if config.is_encoder_decoder:
        raise TypeError(f"model: expected a decoder, got the encoder-decoder {type(model).__name__}")
    if config is not model.config:
        raise TypeError(f"model: expected a text decoder, got {type(model).__name__} with a text model inside")
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not types <= LAYER_TYPES:
        raise ValueError(f"config.layer_types: expected {sorted(LAYER_TYPES)}, got {sorted(types - LAYER_TYPES)}")
    for name in ("attn_logit_softcapping", "attention_chunk_size", "kv_sharing_modes"):
        if getattr(config, name, None) is not None:
            raise ValueError(f"config.{name}: expected None, got {getattr(config, name)}")
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in types or getattr(config, "layer_types", None) is None
    if slides and window is not None and window_size > window:
        raise ValueError(f"window_size: expected at most the model's own sliding window of {window}, got {window_size}")
