"""Decoding: one new token against a state, in O(w) time and memory for any context length."""

from typing import TypeGuard

import torch
from torch import Tensor

from flexdma.signatures import ScoreMod
from flexdma.state.dynamic_mask_state import DynamicMaskState
from flexdma.state.layout import slot_tensors
from flexdma.state.one_query import attended
from flexdma.state.one_token import in_document, inserted
from flexdma.state.slot_writes import copied_into, decode_in_place
from flexdma.state.token_run import has_sizes_of
from flexdma.transforms import can_read, needs_gradient


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    state: DynamicMaskState,
    *,
    bias: Tensor | None = None,
    scale: float | None,
    score_mod: ScoreMod | None = None,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    sink_logits: Tensor | None = None,
    donate: bool,
) -> tuple[Tensor, DynamicMaskState]:
    """Attention of one new token, [B, Hq, 1, Dv], and the state after it.

    query: [B, Hq, 1, D]; key: [B, Hkv, 1, D]; value: [B, Hkv, 1, Dv]; gate, bias: [B, Hkv, 1].
    key_padding_mask, document_ids: [B, 1].
    donate: the slots of `state` are overwritten.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if score_mod is None and _reads_values(query, key, value, gate, bias, state, sink_logits):
        if not donate:
            state = _copied(state)
        return decode_in_place(
            query, key, value, gate, state, bias=bias, scale=scale, key_padding_mask=key_padding_mask,
            document_ids=document_ids, sink_logits=sink_logits,
        )  # fmt: skip
    after = state_after_token(key, value, gate, state, key_padding_mask, document_ids, bias=bias, donate=donate)
    return attended(query, state.length, after, scale, score_mod, sink_logits), after


def state_after_token(
    key: Tensor, value: Tensor, gate: Tensor, state: DynamicMaskState, key_padding_mask: Tensor | None,
    document_ids: Tensor | None, *, bias: Tensor | None = None, donate: bool,
) -> DynamicMaskState:  # fmt: skip
    """The state after one new token, without attention and without reading values; arguments as of `decode`."""
    if document_ids is None:
        return inserted(state, key, value, gate, key_padding_mask, bias=bias, in_place=donate)
    # A copy: the caller may overwrite the ids.
    before = in_document(state, document_ids[:, 0].to(torch.int64, copy=True))
    after = inserted(before, key, value, gate, key_padding_mask, bias=bias)
    return copied_into(state, after) if donate else after


def is_next_token(
    state: object, query: object, key: object, value: object, gate: object, bias: object, options: tuple[object, ...]
) -> "TypeGuard[DynamicMaskState]":
    """Whether this is one more token after one that decoding on a CPU has made the state of, with the same sizes.

    options: (window_size, selection, sinks, recent).
    True only where all checks of `dynamic_mask_attention` would pass; they take as long as decoding itself.
    """
    return (
        not torch.compiler.is_compiling()
        and type(state) is DynamicMaskState
        and state._run is not None
        and type(query) is type(key) is type(value) is type(gate) is Tensor
        and (bias is None or (type(bias) is Tensor and bias.is_cpu))
        and has_sizes_of(state, query, key, value, gate, bias)
        and query.dtype is key.dtype is value.dtype is state.key.dtype
        and query.is_cpu
        and key.is_cpu
        and value.is_cpu
        and gate.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and options == (state.window_size, state.selection, state.sinks, state.recent)
        and tuple(map(type, options[1:])) == (str, int, int)
        and all(type(window) is int for window in (options[0] if isinstance(options[0], tuple) else options[:1]))
    )


def _copied(state: DynamicMaskState) -> DynamicMaskState:
    """The state with copies of its slots."""
    slots = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in slot_tensors(state).items()}
    copy, run = state._with(**slots, _run=None), state._run
    if run is None or not run.continues(state):
        return copy
    return copy._with(_run=run.copied(copy))


def _reads_values(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, bias: Tensor | None, state: DynamicMaskState,
    sink_logits: Tensor | None,
) -> bool:  # fmt: skip
    """Whether code without derivatives may read values of this call's tensors without waiting for a device."""
    tensors = (query, key, value, gate, bias, sink_logits, state.key, state.value, state.gate, state.bias)
    return query.device.type == "cpu" and can_read(query) and not needs_gradient(*tensors)
