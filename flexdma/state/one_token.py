"""The state after one more token, in operations of static shapes, which compile once and export.

The new key replaces the last of w keys in rank or is not kept ("Trainable Dynamic Mask Sparse Attention", arXiv
2508.02124): it writes one slot, or two with sinks and recent tokens.  All operations are elementwise or reductions over
slots.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flexdma.lifespans.ranking import NEVER, last_in_rank, outranks
from flexdma.lifespans.selection import is_above
from flexdma.packing import along_keys
from flexdma.state.dynamic_mask_state import DynamicMaskState


def in_document(state: DynamicMaskState, document: Tensor) -> DynamicMaskState:
    """The state before a token of this document [B].  Where it is not the last token's document, the state loses its keys."""
    ended = (document != state.document)[:, None]
    lost = ended & (state.position >= 0).any(-1)
    slots = ended[..., None]
    return replace(
        state,
        key=state.key.masked_fill(slots[..., None], 0.0),
        value=state.value.masked_fill(slots[..., None], 0.0),
        gate=state.gate.masked_fill(slots, float("-inf")),
        position=state.position.masked_fill(slots, -1),
        document=document,
        last_sink=state.last_sink.masked_fill(ended, -1),
        last_loss=torch.where(lost, state.length[:, None], state.last_loss),
    )


class _Slots(NamedTuple):
    """The contents of n slots: key [B, Hkv, n, D], value [B, Hkv, n, Dv], gate and position [B, Hkv, n]."""

    key: Tensor
    value: Tensor
    gate: Tensor
    position: Tensor


# In the order of `_Slots`.
EMPTY_SLOT = (0.0, 0.0, float("-inf"), -1)


def inserted(
    state: DynamicMaskState,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    key_padding_mask: Tensor | None,
    *,
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

    held, new = _Slots(state.key, state.value, state.gate, state.position), _Slots(key, value, gate, position)
    weakest = _weakest(state, now)
    old = _Slots(*(along_keys(tensor, weakest) for tensor in held))
    if state.selection == "sliding":
        enters = real | _has_left(old.position, now - state.policy.windows(now.device))
        new = _Slots(*(_choose(real, a, a.new_full((), b)) for a, b in zip(new, EMPTY_SLOT, strict=True)))
    else:
        enters = real & ~outranks(old.gate, gate)
    if state.selection == "threshold":
        enters = enters & is_above(gate, state.policy.threshold)
    slot, writes, arriving = weakest, enters, new
    lost = enters & (old.position >= 0)
    last_sink = state.last_sink

    if state.sinks + state.recent:
        before = last_sink[..., None]
        sinks = ((state.position >= 0) & (state.position <= before)).sum(-1, keepdim=True)
        latest = torch.where(real & (sinks < state.sinks), now, before)
        last_sink = latest.squeeze(-1)
        # Of the weakest and the new key, the one outside the top-w may stay as a sink or a recent key.
        loser = _Slots(*(_choose(enters, a, b) for a, b in zip(old, new, strict=True)))
        stays = _protected(loser.position, latest, now, state.recent)
        loser = _Slots(*(_choose(stays, a, a.new_full((), b)) for a, b in zip(loser, EMPTY_SLOT, strict=True)))
        others = state.position[..., state.widest :]
        safe = _protected(others, latest, now, state.recent)
        expired = (others >= 0) & ~safe  # at most one key, which is no longer recent
        expires = expired.any(-1, keepdim=True)
        lost = (lost & ~stays) | expires
        free = state.widest + torch.where(expired, 0, torch.where(safe, 2, 1)).argmin(-1, keepdim=True)
        slot, writes = torch.cat([weakest, free], -1), torch.cat([enters, stays | expires], -1)
        arriving = _Slots(*(torch.cat(pair, 2) for pair in zip(new, loser, strict=True)))

    after = _Slots(
        *(written(tensor, slot, writes, fresh, in_place) for tensor, fresh in zip(held, arriving, strict=True))
    )
    return replace(
        state,
        key=after.key,
        value=after.value,
        gate=after.gate,
        position=after.position,
        length=state.length + 1,
        real_length=state.real_length + seen,
        last_padding=torch.where(seen > 0, state.last_padding, state.length),
        last_sink=last_sink,
        last_loss=torch.where(lost.squeeze(-1), state.length[:, None], state.last_loss),
    )


def written(tensor: Tensor, slot: Tensor, writes: Tensor, fresh: Tensor, in_place: bool) -> Tensor:
    """Slots [B, Hkv, C, ...] with `fresh` [B, Hkv, n, ...] in the slots `slot` [B, Hkv, n] where `writes` [B, Hkv, n]."""
    index = slot if tensor.dim() == 3 else slot[..., None].expand_as(fresh)
    values = _choose(writes, fresh, tensor.gather(2, index)).to(tensor.dtype)
    if not in_place:
        return tensor.scatter(2, index, values)
    # Inductor computes index_put_ in place, but scatter_ on a copy of all slots.
    batch, head = (torch.arange(size, device=slot.device) for size in slot.shape[:2])
    return tensor.index_put_((batch[:, None, None], head[:, None], slot), values)


def _weakest(state: DynamicMaskState, now: Tensor) -> Tensor:
    """[B, Hkv, 1]: the slot of the top-w to overwrite: an empty one, else that of the last key in rank.

    Of a sliding window: that of the key that leaves it at `now` [B, 1, 1], else an empty one.
    """
    gate, position = (tensor[..., : state.widest] for tensor in (state.gate, state.position))
    beyond = beyond_window(state) if isinstance(state.window_size, tuple) else None
    if state.selection != "sliding":
        return last_in_rank(gate, position, beyond)
    left = _has_left(position, now - state.policy.windows(now.device))
    age = torch.where(left, -2, position)
    return (age if beyond is None else age.masked_fill(beyond, NEVER)).argmin(-1, keepdim=True)


def _has_left(position: Tensor, last: Tensor) -> Tensor:
    """Whether keys at these positions are not after `last`."""
    return (position >= 0) & (position <= last)


def beyond_window(state: DynamicMaskState) -> Tensor:
    """[Hkv, w]: whether a slot of the top-w is beyond its head's own window."""
    device = state.gate.device
    return torch.arange(state.widest, device=device) >= state.policy.windows(device)


def _protected(position: Tensor, last_sink: Tensor, now: Tensor, recent: int) -> Tensor:
    """Whether the keys at these positions are sinks or recent."""
    return (position >= 0) & ((position <= last_sink) | (position > now - recent))


def _choose(condition: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """torch.where(condition, first, second) for condition [B, Hkv, n] and tensors [B, Hkv, n, ...]."""
    return torch.where(condition if first.dim() == 3 else condition[..., None], first, second)
