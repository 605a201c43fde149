"""Add the gates of Dynamic Mask Attention (arXiv 2508.02124) to any decoder whose layers call the attention interface.

A new gate is constant (A = 0), and of equal gates the newest rank highest.  So the converted model starts as the old model
with a sliding window of w, and equals the old model while the context is not longer than w.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from flexdma import checks
from flexdma.gates import FORMS, RECENCIES, ValueGate
from flexdma.integrations.transformers.cache import given_cache
from flexdma.integrations.transformers.eligibility import attention_calls, refuse_wider_windows
from flexdma.integrations.transformers.falcon import reroute, rerouted
from flexdma.integrations.transformers.float32_gate import Float32Gate
from flexdma.integrations.transformers.generation import bound_the_cache
from flexdma.integrations.transformers.key_energies import KeyValueGate, gate_input_size
from flexdma.integrations.transformers.layer_selections import as_json, layer_selections
from flexdma.integrations.transformers.masks import FULL, NAME
from flexdma.integrations.transformers.own_config import own_config
from flexdma.integrations.transformers.packed_positions import find_packed_positions
from flexdma.integrations.transformers.probe import NAME as PROBE
from flexdma.integrations.transformers.saving import save_with_the_gates
from flexdma.lifespans import Selection

Model = TypeVar("Model", bound=PreTrainedModel)


def convert_to_dma(
    model: Model,
    window_size: int | Sequence[int | Sequence[int]] | None,
    *,
    selection: str = "causal",
    form: str = "exp",
    recency: str | None = None,
    recency_ranks: bool = True,
    slopes: Sequence[float] | None = None,
    sinks: int = 0,
    recent: int | Sequence[int] = 0,
    lowering: str | None = None,
    reads_keys: bool = False,
) -> Model:
    """Add a `value_gate` (a `ValueGate`) to every attention layer and compute its attention with flexdma.

    Changes the model in place and returns it.

    model: a decoder of transformers (docs/transformers.md lists families).  Its weights and their names do not change.
        Two forward passes of three tokens find the attention layers.  The model may be on meta, but not sharded.
    window_size: w, or one item per attention layer, in order of `layer_idx`: an int or one int per KV head.  It replaces the
        model's own sliding windows, and w + recent must not be larger than they are.
    selection: of the operator, "causal" or "threshold"; with "threshold" window_size may be None, and the cache of `generate`
        grows with the number of keys whose gates are above 0.
    recent: of the operator, an int or one per attention layer.
    form, recency: of the gate.  recency_ranks: False = the recency is added to logits, and keys are ranked without it.
    slopes: with recency="slope" the Hkv initial slopes; default 0, which starts as no recency.
    sinks, lowering: of the operator.
    reads_keys: whether gates read the energies of keys beside values, see `key_energies.py`.

    With recency None and "slope" the converted model starts exactly as a sliding window of w + recent, plus `sinks` keys.
    A gate starts as exp(0) = 1 with form="exp", so that a threshold alone starts as full attention, and as 0 with the other
    forms, so that it starts as sinks and recent tokens alone.
    With "forget" the window starts with a decay of 0.05 logits per token, the same for all tokens.
    The options and sizes are written to `model.config.flexdma`, in a copy of the config, from which
    `flexdma.integrations.transformers.from_pretrained` rebuilds the model.
    Gates are float32 for any dtype of the model, because bfloat16 would lose small steps of A.
    Raises TypeError or ValueError naming the property of the model that is not supported.
    """
    choice = {
        "window_size": as_json(window_size), "form": form, "recency": recency, "sinks": sinks, "recent": as_json(recent)
    }  # fmt: skip
    if not recency_ranks:
        choice["recency_ranks"] = False
    if reads_keys:
        choice["reads_keys"] = True
    if selection != "causal":
        choice["selection"] = selection
    checks.one_of("form", form, FORMS)
    checks.one_of("recency", recency, RECENCIES)
    checks.recency_ranks(recency_ranks, recency)
    checks.one_of("lowering", lowering, (None, *checks.LOWERINGS))
    check_unconverted(model)
    with rerouted(model):
        calls = attention_calls(model)
    policies = layer_selections(choice, [call.value.shape[1] for call in calls])
    refuse_wider_windows(calls, policies, choice)
    own_config(model)
    gates = []
    for call in calls:
        with torch.device(call.value.device):
            size = gate_input_size(call.key, call.value, reads_keys)
            gates.append(new_gate(call.value.shape[1], size, choice, slopes))
    for call, gate, policy in zip(calls, gates, policies, strict=True):
        attach(call.layer, gate, policy, lowering)
    names = {module: name for name, module in model.named_modules()}
    sizes = {names[call.layer]: [gate.num_kv_heads, gate.head_dim] for call, gate in zip(calls, gates, strict=True)}
    return finish(model, {**choice, "value_heads": sizes})


def new_gate(heads: int, size: int, choice: dict[str, Any], slopes: Sequence[float] | None = None) -> ValueGate:
    """A gate for heads with this size of input, constant at initialisation."""
    recency = choice["recency"]
    start = [0.0] * heads if recency == "slope" and slopes is None else slopes
    kind = KeyValueGate if choice.get("reads_keys") else Float32Gate
    gate = kind(heads, size, choice["form"], recency, slopes=start, initial_a=0.0)
    gate.recency_ranks = choice.get("recency_ranks", True)
    if recency == "forget":
        nn.init.zeros_(gate.forget_proj.weight)  # the same decay for all tokens until training
    return gate


def attach(layer: Any, gate: ValueGate, selection: Selection, lowering: str | None) -> None:
    """Add to an attention layer the attributes and the hook that `attention_interface` needs."""
    reroute(layer)
    layer.value_gate = gate.train(layer.training)
    layer.dynamic_mask_options = {
        "window_size": selection.window_size, "selection": selection.kind, "sinks": selection.sinks,
        "recent": selection.recent, "lowering": lowering,
    }  # fmt: skip
    layer.register_forward_pre_hook(_show_the_cache, with_kwargs=True)


def finish(model: Model, choice: dict[str, Any]) -> Model:
    """Set the attention implementation, config, cache and hooks of a model whose layers have gates."""
    model.config._attn_implementation = NAME
    model.config.flexdma = choice
    bound_the_cache(model)
    save_with_the_gates(model)
    find_packed_positions(model)
    return model


def _show_the_cache(layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Pre-hook that adds the cache to the layer's keywords: layers pass unknown ones, but not the cache, to the interface."""
    implementation = layer.config._attn_implementation
    if implementation == PROBE:
        return args, kwargs  # the probe has such a hook of its own
    if implementation not in (NAME, FULL):
        raise ValueError(
            f"attn_implementation: expected {NAME!r} for a converted model, got {implementation!r}, which has no gates"
        )
    return args, {**kwargs, "dynamic_mask_cache": given_cache((*args, *kwargs.values()))}


def check_unconverted(model: Any) -> None:
    """Raise TypeError or ValueError unless the model is one of transformers without gates."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    if any(hasattr(module, "value_gate") for module in model.modules()):
        raise ValueError(f"model: expected one not yet converted, got {getattr(model.config, 'flexdma', None)}")
