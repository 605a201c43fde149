"""Any decoder whose layers call the attention interface, given the gates of Dynamic Mask Attention (arXiv 2508.02124).

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
from flexdma.integrations.transformers.eligibility import attention_calls
from flexdma.integrations.transformers.falcon import reroute, rerouted
from flexdma.integrations.transformers.generation import bound_the_cache
from flexdma.integrations.transformers.masks import NAME

Model = TypeVar("Model", bound=PreTrainedModel)


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

    model: a decoder of transformers (docs/transformers.md lists families); its weights and their names stay as they are.
        Two forward passes of three tokens show which layers attend and how; a model on meta will do, a sharded one will not.
    window_size: w.  Where the model has sliding windows, at most as long as they are: w takes their place.
    form, recency: the gate's.  slopes: with recency="slope" the Hkv initial slopes; default 0, which starts as no recency.
    sinks, recent, lowering: the operator's.

    The start is exactly a sliding window of w, with `sinks` more keys if any, for recency None and "slope".  With "forget"
    that window starts with a decay of 0.05 logits per token in it, the same for all tokens.
    The choice and the sizes are written to `model.config.flexdma`, from which
    `flexdma.integrations.transformers.from_pretrained` rebuilds the model.
    Gates are float32 whatever the model's dtype: small steps of A would vanish in bfloat16.
    Raises TypeError or ValueError naming what the model has that is not supported.
    """
    choice = {"window_size": window_size, "form": form, "recency": recency, "sinks": sinks, "recent": recent}
    _check_choice(choice, lowering)
    _check_unconverted(model)
    with rerouted(model):
        calls = attention_calls(model, window_size)
    gates = []
    for call in calls:
        with torch.device(call.value.device):
            gates.append(new_gate(call.value.shape[1], call.value.shape[3], choice, slopes))
    for call, gate in zip(calls, gates, strict=True):
        attach(call.layer, gate, choice, lowering)
    names = {module: name for name, module in model.named_modules()}
    sizes = {names[call.layer]: [gate.num_kv_heads, gate.head_dim] for call, gate in zip(calls, gates, strict=True)}
    return finish(model, {**choice, "value_heads": sizes})


def new_gate(heads: int, size: int, choice: dict[str, Any], slopes: Sequence[float] | None = None) -> ValueGate:
    """A gate for values [B, heads, K, size] that begins as a constant."""
    recency = choice["recency"]
    start = [0.0] * heads if recency == "slope" and slopes is None else slopes
    gate = ValueGate(heads, size, choice["form"], recency, slopes=start)
    if recency == "forget":
        nn.init.zeros_(gate.forget_proj.weight)  # one decay for all tokens, until trained
    return gate


def attach(layer: Any, gate: ValueGate, choice: dict[str, Any], lowering: str | None) -> None:
    """Give an attention layer what the attention interface asks it for."""
    reroute(layer)
    layer.value_gate = gate.train(layer.training)
    options = {name: choice[name] for name in ("window_size", "sinks", "recent")}
    layer.dynamic_mask_options = {**options, "lowering": lowering}
    layer.register_forward_pre_hook(_show_the_cache, with_kwargs=True)


def finish(model: Model, choice: dict[str, Any]) -> Model:
    """Let a model whose layers have gates compute, generate and be saved with them."""
    model.config._attn_implementation = NAME
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


def _check_unconverted(model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    if any(hasattr(module, "value_gate") for module in model.modules()):
        raise ValueError(f"model: expected one not yet converted, got {getattr(model.config, 'flexdma', None)}")
