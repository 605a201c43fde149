"""Several new tokens against a GrowingState: their attention, and the state after them.

The slots of the state come first, then the new keys; a key's place among them is its birth.  Its death is the place of the
first query whose clock passes its expiry, or whose document is another.  So any lowering attends to them as to one sequence.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flexdma.lifespans import Lifespans
from flexdma.lifespans.selection import document_bounds
from flexdma.packing.counting import count_up_to
from flexdma.state.carry import Keys
from flexdma.state.growing import GrowingState
from flexdma.state.layout import first_places, keys_at, slot_tensors


class NewKeys(NamedTuple):
    """n new tokens: key [B, Hkv, n, D], value [B, Hkv, n, Dv], gate and bias [B, Hkv, n]; bias None = no biases.

    lifetime: [B, Hkv, n] -> the positions that each key lives, for its flags [B, Hkv, n] whether it is a sink; None with a
        clock.
    expiry, clock: [B, Hkv, n] float64, or None: the clock reads positions.
    key_padding_mask, document_ids: [B, n] or None.
    """

    key: Tensor
    value: Tensor
    gate: Tensor
    lifetime: Callable[[Tensor], Tensor] | None
    expiry: Tensor | None
    clock: Tensor | None
    key_padding_mask: Tensor | None
    document_ids: Tensor | None
    bias: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """[B, Hkv, n]: whether a key is not masked."""
        real = self.gate != float("-inf")
        return real if self.key_padding_mask is None else real & self.key_padding_mask[:, None]

    def expiries(self, position: Tensor, is_sink: Tensor) -> Tensor:
        """[B, Hkv, n] float64: the last reading at which each key is visible."""
        if self.lifetime is None:
            assert self.expiry is not None
            return self.expiry
        return position + self.lifetime(is_sink) - 1

    def readings(self, position: Tensor) -> Tensor:
        """[B, Hkv, n] float64: the clock of each token."""
        return position.double() if self.clock is None else self.clock


class Placed(NamedTuple):
    """C slots, then n new keys; M = C + n.

    keys: in slots and new, `new` = n.  lifespans: int32 [B, Hkv, M], of places.  expiry: [B, Hkv, M].
    is_sink: [B, Hkv, M].
    """

    keys: Keys
    lifespans: Lifespans
    expiry: Tensor
    is_sink: Tensor

    @property
    def alive(self) -> Tensor:
        """[B, Hkv, M] bool: the keys that the last token sees."""
        birth, death = self.lifespans
        return (death == birth.shape[-1]) & (birth < death)

    @property
    def seen(self) -> Tensor:
        """[B, Hkv, n]: how many keys each new token sees."""
        birth, death = self.lifespans
        held = birth.shape[-1] - self.keys.new
        lives = (death > birth).int()
        # One more cell, for keys that live on.
        begins, ends = ((bound - held).clamp(0, self.keys.new).long() for bound in (birth, death))
        steps = torch.zeros((*birth.shape[:-1], self.keys.new + 1), dtype=torch.int32, device=birth.device)
        return steps.scatter_add(-1, begins, lives).scatter_add(-1, ends, -lives)[..., :-1].cumsum(-1)


def placed(state: GrowingState, new: NewKeys) -> Placed:
    """The keys of the state and the new ones.  O(C + n) time, with a clock O((C + n) log n)."""
    batch, heads, slots = state.position.shape
    count = new.key.shape[2]
    total = slots + count
    place = torch.arange(total, device=state.position.device)
    arrivals = state.length[:, None, None] + place[:count]
    position = torch.cat([state.position, arrivals.expand(batch, heads, -1)], -1)
    held, document_ids = state.position >= 0, None
    start, end = place.new_zeros(1), place.new_full((1,), total)
    if new.document_ids is not None:
        document_ids = torch.cat([state.document[:, None].expand(-1, slots), new.document_ids.long()], 1)
        start, end = document_bounds(document_ids)
    real = torch.cat([held, new.real], -1)
    # A state holds all sinks of its document, so they are counted among its keys.
    counted = torch.cat([held & (state.position <= state.last_sink[..., None]), new.real], -1)
    rank = counted.cumsum(-1)
    rank = rank - (rank - counted.long()).gather(-1, start.expand_as(rank))
    is_sink = counted & (rank <= state.sinks)
    new_expiry = new.expiries(arrivals, is_sink[..., slots:]).expand(batch, heads, -1)
    expiry = torch.cat([state.expiry, new_expiry], -1)
    death = torch.minimum(slots + _readings_up_to(expiry, new, arrivals), end)
    death = torch.where(real, torch.maximum(death, place), place)
    lifespans = Lifespans(place.int().expand(batch, heads, -1).contiguous(), death.int().contiguous())
    keys = Keys(
        torch.cat([state.key, new.key], 2), torch.cat([state.value, new.value], 2), torch.cat([state.gate, new.gate], 2),
        position, None, document_ids, count,
        None if new.bias is None or state.bias is None else torch.cat([state.bias, new.bias], 2),
    )  # fmt: skip
    return Placed(keys, lifespans, expiry, is_sink)


def _readings_up_to(expiry: Tensor, new: NewKeys, arrivals: Tensor) -> Tensor:
    """[B, Hkv, M] int64: how many new tokens read a clock up to the expiry."""
    count = new.key.shape[2]
    if new.clock is not None:
        # A reading that is NaN passes no expiry.
        clock = torch.where(new.clock.isnan(), float("-inf"), new.clock).cummax(-1).values
        return count_up_to(clock, expiry.contiguous())
    # inf and NaN are no integers.
    return (expiry - (arrivals[..., :1] - 1)).nan_to_num(nan=float("inf")).clamp(0, count).long()


def after_chunk(state: GrowingState, new: NewKeys, placed: Placed, alive: Tensor, slots: int) -> GrowingState:
    """The state after these tokens, with the living keys, `alive` of `placed`, in this many slots."""
    birth, death = placed.lifespans
    keys, total = placed.keys, birth.shape[-1]
    before = total - keys.new
    ended = (birth < death) & (death < total) & (death >= before)
    lost = torch.where(ended, death.long() - before, -1).amax(-1)
    place = first_places(alive, slots)
    real_length, last_padding = state.real_length + keys.new, state.last_padding
    if new.key_padding_mask is not None:
        padded = torch.where(new.key_padding_mask, -1, torch.arange(keys.new, device=alive.device)).amax(-1)
        last_padding = torch.where(padded >= 0, state.length + padded, last_padding)
        real_length = state.real_length + new.key_padding_mask.sum(-1)
    document = state.document
    if new.document_ids is not None:
        # A copy: the caller may overwrite the ids, and torch.compile would guard the strides of a view.
        document = new.document_ids[:, -1].to(torch.int64, copy=True)
    return replace(
        state,
        **keys_at(place, slot_tensors(keys) | {"expiry": placed.expiry}),
        length=state.length + keys.new,
        real_length=real_length,
        last_padding=last_padding,
        document=document,
        last_sink=torch.where(placed.is_sink & alive, keys.position, -1).amax(-1),
        last_loss=torch.where(lost >= 0, state.length[:, None] + lost, state.last_loss),
        peak=torch.maximum(state.peak, placed.seen.amax(-1)),
    )
