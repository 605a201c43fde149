"""The state after one more token, in operations of static shapes, which compile once and export.

A token writes one slot: an empty one, or that of the key which leaves, the last of w + 1 keys in rank ("Trainable Dynamic
Mask Sparse Attention", arXiv 2508.02124).  Slots are in any order, because positions show which keys are sinks or recent; so
no key ever moves to another slot.  All operations are elementwise or reductions over slots.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flexdma.lifespans.ranking import last_in_rank, outranks
from flexdma.lifespans.selection import is_above
from flexdma.state.dynamic_mask_state import DynamicMaskState
from flexdma.state.layout import emptied


def in_document(state: DynamicMaskState, document: Tensor) -> DynamicMaskState:
    """The state before a token of this document [B].  Where it is not the last token's document, the state loses its keys."""
    ended = (document != state.document)[:, None]
    lost = ended & (state.position >= 0).any(-1)
    return replace(
        state,
        **emptied(state, ended[..., None]),
        document=document,
        last_sink=state.last_sink.masked_fill(ended, -1),
        last_loss=torch.where(lost, state.length[:, None], state.last_loss),
    )


def inserted(
    state: DynamicMaskState,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    key_padding_mask: Tensor | None,
    *,
    bias: Tensor | None = None,
    in_place: bool = False,
) -> DynamicMaskState:
    """The state after one more key [B, Hkv, 1, D] of the same document.  O(C) time.

    in_place: the slots of the result are those of `state`, overwritten.
    """
    now = state.length[:, None, None]  # [B, 1, 1]: position of the new token
    real = gate != float("-inf")  # [B, Hkv, 1]
    seen = torch.ones_like(state.length)
    if key_padding_mask is not None:
        real = real & key_padding_mask[:, None]
        seen = key_padding_mask[:, 0].long()
    gate = gate.masked_fill(~real, float("-inf"))
    position = torch.where(real, now, -1)
    is_candidate, last_sink = real, state.last_sink
    if state.sinks:
        before = last_sink[..., None]
        sinks = ((state.position >= 0) & (state.position <= before)).sum(-1, keepdim=True)
        is_sink = real & (sinks < state.sinks)
        is_candidate, last_sink = real & ~is_sink, torch.where(is_sink, now, before).squeeze(-1)
    enters, leaves, slot = _exchanged(state, now, gate, is_candidate)
    if state.sinks:
        enters = enters | is_sink
    if state.recent or state.selection == "sliding":  # a key may leave at a masked token
        key, value = (tensor.masked_fill(~real[..., None], 0.0) for tensor in (key, value))
    fresh = {"key": key, "value": value, "gate": gate, "position": position}
    if bias is not None:
        fresh["bias"] = bias.masked_fill(~real, 0.0)
    writes = enters | leaves
    after: dict[str, Any] = {
        name: written(getattr(state, name), slot, writes, new, in_place) for name, new in fresh.items()
    }
    return replace(
        state,
        **after,
        length=state.length + 1,
        real_length=state.real_length + seen,
        last_padding=torch.where(seen > 0, state.last_padding, state.length),
        last_sink=last_sink,
        last_loss=torch.where(leaves.squeeze(-1), state.length[:, None], state.last_loss),
    )


def _exchanged(
    state: DynamicMaskState, now: Tensor, gate: Tensor, is_candidate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Whether the key of the token at `now` enters, whether another leaves, and the slot of that one, or an empty slot.

    now: [B, 1, 1].  gate: [B, Hkv, 1].  is_candidate: whether the new key is real and no sink.  All others [B, Hkv, 1] too.
    """
    position, recent, before = state.position, state.recent, state.last_sink[..., None]
    windows = state.window_size if isinstance(state.window_size, int) else state.policy.windows(now.device)
    if state.selection == "sliding":
        left = (position > before) & (position <= now - recent - windows)
        leaves = left.any(-1, keepdim=True)
        return is_candidate, leaves, torch.where(leaves, left, position < 0).long().argmax(-1, keepdim=True)
    level, excluded = state.gate, None
    if recent or isinstance(windows, Tensor):
        # The keys that compete now.  With recent tokens the newest of them is no longer one.
        others = (position > before) & (position <= now - recent)
        count = others.sum(-1, keepdim=True)
        leaves = count > windows if recent else count >= windows
        if recent and state.selection == "threshold":
            level = level.masked_fill(~is_above(level, state.policy.threshold), float("-inf"))
            leaves = leaves | (others & (level == float("-inf"))).any(-1, keepdim=True)
        excluded = ~torch.where(leaves, others, position < 0)
    elif state.sinks:
        excluded = (position >= 0) & (position <= before)
    slot = last_in_rank(level, position, excluded)
    if recent:
        return is_candidate, leaves, slot
    enters = is_candidate & ~outranks(state.gate.gather(-1, slot), gate)
    if state.selection == "threshold":
        enters = enters & is_above(gate, state.policy.threshold)
    return enters, enters & (position.gather(-1, slot) >= 0), slot


def written(tensor: Tensor, slot: Tensor, writes: Tensor, fresh: Tensor, in_place: bool) -> Tensor:
    """Slots [B, Hkv, C, ...] with `fresh` [B, Hkv, 1, ...] in the slot `slot` [B, Hkv, 1] where `writes` [B, Hkv, 1]."""
    index = slot if tensor.dim() == 3 else slot[..., None].expand_as(fresh)
    writes = writes if tensor.dim() == 3 else writes[..., None]
    values = torch.where(writes, fresh, tensor.gather(2, index)).to(tensor.dtype)
    if not in_place:
        return tensor.scatter(2, index, values)
    # Inductor computes index_put_ in place, but scatter_ on a copy of all slots.
    batch, head = (torch.arange(size, device=slot.device) for size in slot.shape[:2])
    return tensor.index_put_((batch[:, None, None], head[:, None], slot), values)
