"""Decoding: one new token against a state, in O(w) time and memory for any context length."""

from dataclasses import replace

import torch
from torch import Tensor

from flexdma.signatures import ScoreMod
from flexdma.state.dynamic_mask_state import DynamicMaskState
from flexdma.state.layout import SLOTS
from flexdma.state.one_token import attended, in_document, inserted
from flexdma.state.slot_writes import copied_into, decode_in_place
from flexdma.transforms import can_read, needs_gradient


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    state: DynamicMaskState,
    *,
    scale: float | None,
    score_mod: ScoreMod | None,
    key_padding_mask: Tensor | None,
    document_ids: Tensor | None,
    sink_logits: Tensor | None,
    donate: bool,
) -> tuple[Tensor, DynamicMaskState]:
    """Attention of one new token, [B, Hq, 1, Dv], and the state after it.

    query: [B, Hq, 1, D]; key: [B, Hkv, 1, D]; value: [B, Hkv, 1, Dv]; gate: [B, Hkv, 1].
    key_padding_mask, document_ids: [B, 1].
    donate: the slots of `state` are overwritten.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if score_mod is None and _reads_values(query, key, value, gate, state, sink_logits):
        if not donate:
            slots = {name: getattr(state, name).clone(memory_format=torch.contiguous_format) for name in SLOTS}
            state = replace(state, **slots)
        return decode_in_place(
            query, key, value, gate, state, scale=scale, key_padding_mask=key_padding_mask, document_ids=document_ids,
            sink_logits=sink_logits,
        )  # fmt: skip
    if document_ids is None:
        after = inserted(state, key, value, gate, key_padding_mask, in_place=donate)
    else:
        # A copy: the caller may overwrite the ids.
        before = in_document(state, document_ids[:, 0].to(torch.int64, copy=True))
        after = inserted(before, key, value, gate, key_padding_mask)
        after = copied_into(state, after) if donate else after
    return attended(query, state.length, after, scale, score_mod, sink_logits), after


def _reads_values(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, state: DynamicMaskState, sink_logits: Tensor | None
) -> bool:
    """Whether code without derivatives may read values of this call's tensors without waiting for a device."""
    tensors = (query, key, value, gate, sink_logits, state.key, state.value, state.gate)
    return query.device.type == "cpu" and can_read(query) and not needs_gradient(*tensors)
