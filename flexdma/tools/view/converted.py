"""A converted model of transformers, and beside it the full model of the same weights, over the tokens of a text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from flexdma.integrations.transformers.converted import converted_layers, windows_per_head
from flexdma.integrations.transformers.falcon import rerouted
from flexdma.lifespans import Lifespans, Selection
from flexdma.tools.language_models import full_attention
from flexdma.tools.view.attended import Attended, attend_and_note
from flexdma.tools.view.record import ShownLayer, ShownModel

NAME = "flexdma_view"
Tick = Callable[[], object]


def shown_model(model: Any, ids: Tensor, label: str, tick: Tick) -> ShownModel:
    """The page's numbers of a converted model for tokens ids [1, N].

    tick: called after each layer of the two forward passes.
    """
    layers, gates = converted_layers(model), observed_gates(model, ids, tick)
    selections = {layer.layer_idx: _selection(layer) for layer in layers}
    kept = {number: selections[number].lifespans(gate) for number, gate in gates.items()}
    attended = observed_attention(full_attention(model), ids, kept, tick)
    return ShownModel(
        label,
        [
            ShownLayer(
                [window + selections[number].sinks + selections[number].recent for window in windows_per_head(layer)],
                kept[number],
                gates[number],
                attended[number],
            )
            for number, layer in zip(selections, layers, strict=True)
        ],
    )


@torch.no_grad()
def observed_gates(model: Any, ids: Tensor, tick: Tick) -> dict[int, Tensor]:
    """The gates [1, Hkv, N] of each layer, by `layer_idx`, in a forward pass of a converted model."""
    gates: dict[int, Tensor] = {}

    def note(number: int) -> Callable[..., None]:
        def hook(gate: Any, values: Any, output: Any) -> None:
            # A tuple has the gates first, then a recency that does not rank.
            gates[number] = output[0] if isinstance(output, tuple) else output
            tick()

        return hook

    hooks = [layer.value_gate.register_forward_hook(note(layer.layer_idx)) for layer in converted_layers(model)]
    try:
        model.base_model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return gates


@torch.no_grad()
def observed_attention(plain: Any, ids: Tensor, kept: dict[int, Lifespans], tick: Tick) -> dict[int, Attended]:
    """The attention of each layer, by `layer_idx`, in a forward pass of a model without gates.

    kept: of each layer, the lifespans [1, Hkv, N] of the converted model.
    """
    found: dict[int, Attended] = {}

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Tensor:
        number = module.layer_idx
        output, found[number] = attend_and_note(query, key, value, mask, kept[number], **options)
        tick()
        return output

    with rerouted(plain), _calling(plain, attend):
        plain.base_model(input_ids=ids, use_cache=False)
    return found


def _selection(layer: Any) -> Selection:
    options = layer.dynamic_mask_options
    heads = layer.value_gate.num_kv_heads
    return Selection.of(options["selection"], options["window_size"], options["sinks"], options["recent"], heads=heads)


_attend: ContextVar[Callable[..., Tensor]] = ContextVar("attend")


@contextmanager
def _calling(plain: Any, attend: Callable[..., Tensor]) -> Iterator[None]:
    """While active, the layers of the model call `attend`."""
    before, token = plain.config._attn_implementation, _attend.set(attend)
    plain.config._attn_implementation = NAME
    try:
        yield
    finally:
        plain.config._attn_implementation = before
        _attend.reset(token)


def _interface(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface, with the arguments that models have which `convert_to_dma` takes."""
    output = _attend.get()(module, query, key, value, attention_mask, scale=scaling, softcap=softcap, sink_logits=s_aux)
    return output.transpose(1, 2).to(query.dtype).contiguous(), None


AttentionInterface.register(NAME, _interface)
AttentionMaskInterface.register(NAME, eager_mask)
