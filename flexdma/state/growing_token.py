"""One new token against a GrowingState, in operations of static shapes: it writes the first empty slot of each head."""

import math

import torch
from torch import Tensor

from flexdma.signatures import ScoreMod
from flexdma.state.cpu_attention import attention_of_one
from flexdma.state.growing import GrowingState
from flexdma.state.growing_chunk import NewKeys
from flexdma.state.growing_slots import GROWING_SLOTS
from flexdma.state.layout import EMPTY, slot_tensors
from flexdma.state.one_query import attended, logit_bias
from flexdma.state.one_token import written

FULL = "state: expected an empty slot in every head, got a full one; call state.reserve(tokens) before a compiled call"


def after_token(state: GrowingState, new: NewKeys, *, in_place: bool) -> GrowingState:
    """The state after one more token.  O(C) time.

    Keys and values of dead keys stay in their slots.  in_place: the slots of the result are those of `state`, overwritten.
    """
    now = state.length[:, None, None]
    held = state.position >= 0
    dies = held & (new.readings(now) > state.expiry)
    last_sink, document = state.last_sink, state.document
    if new.document_ids is not None:
        # A copy: the caller may overwrite the ids.
        document = new.document_ids[:, 0].to(torch.int64, copy=True)
        ended = (document != state.document)[:, None]
        dies = dies | (held & ended[..., None])
        last_sink = last_sink.masked_fill(ended, -1)
    lives = held & ~dies
    real = new.real
    if state.sinks:
        before = last_sink[..., None]
        is_sink = real & ((lives & (state.position <= before)).sum(-1, keepdim=True) < state.sinks)
        last_sink = torch.where(is_sink, now, before).squeeze(-1)
    else:
        is_sink = torch.zeros_like(real)
    expiry = new.expiries(now, is_sink)
    arrives = real & ~(new.readings(now) > expiry)
    slot = lives.int().argmin(-1, keepdim=True)
    seen, padding = torch.ones_like(state.length), state.last_padding
    if new.key_padding_mask is not None:
        seen = new.key_padding_mask[:, 0].long()
        padding = torch.where(seen > 0, padding, state.length)
    fresh = {"key": new.key, "value": new.value, "gate": new.gate, "position": now.expand(slot.shape), "expiry": expiry}
    if new.bias is not None:
        fresh["bias"] = new.bias
    slots = _without(state, dies, in_place)
    slots = {name: written(slots[name], slot, arrives, each.expand(*slot.shape, *each.shape[3:]), in_place)
             for name, each in fresh.items()}  # fmt: skip
    return state._with(
        **slots,
        length=state.length + 1,
        real_length=state.real_length + seen,
        last_padding=padding,
        document=document,
        last_sink=last_sink,
        last_loss=torch.where(dies.any(-1), state.length[:, None], state.last_loss),
        peak=torch.maximum(state.peak, lives.sum(-1) + arrives.squeeze(-1)),
    )


def _without(state: GrowingState, dies: Tensor, in_place: bool) -> dict[str, Tensor]:
    """The slots of the state, in which those of the keys that die, [B, Hkv, C] bool, are empty."""
    slots = slot_tensors(state, GROWING_SLOTS)
    for name in ("gate", "position", "bias"):
        if name in slots:
            slots[name] = (slots[name].masked_fill_ if in_place else slots[name].masked_fill)(dies, EMPTY.get(name, 0))
    return slots


def attention_after(
    query: Tensor, now: Tensor, state: GrowingState, scale: float, score_mod: ScoreMod | None, sink_logits: Tensor | None,
    *, reads: bool,
) -> Tensor:  # fmt: skip
    """Attention of query [B, Hq, 1, D] at positions now [B] to the keys of the state.

    reads: whether values may be read.
    """
    if reads and score_mod is None and sink_logits is None:
        held = (state.position >= 0).any(0).any(0).nonzero()
        slots = int(held[-1]) + 1 if len(held) else 0
        added = logit_bias(state)[..., :slots]
        best = added.amax(-1, keepdim=True) if slots else added.new_full((1,), float("nan"))
        if math.isfinite(best.sum().item()):
            bias = (added - best).unsqueeze(2)
            output = attention_of_one(query, state.key[:, :, :slots], state.value[:, :, :slots], bias, scale)
            # A dead key or value that is not finite makes this one NaN.
            if math.isfinite(output.sum().item()):
                return output
    return attended(query, now, without_dead_values(state), scale, score_mod, sink_logits)


def without_dead_values(state: GrowingState) -> GrowingState:
    """The state with values of 0 in empty slots: those of dead keys are not cleared, and may not be finite."""
    return state._with(value=state.value.masked_fill((state.position < 0)[..., None], 0.0))
