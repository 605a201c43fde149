"""The keys of the heads of a run as Python numbers: which slot the next key takes, and which key leaves for it.

Two sorts find the recent keys of each head, and of the keys that compete the last COUNT in rank.  The tokens after them join
the recent ones, and compete when they are no longer recent.
"""

import math
from collections import deque
from heapq import heappop, heapreplace

import torch
from torch import Tensor

from flexdma.lifespans.ranking import NEVER
from flexdma.state.dynamic_mask_state import DynamicMaskState

# Keys of each head that one sort finds.
COUNT = 32
# (gate, position, slot): a slot, a number in [B Hkv C], and the key in it; an empty slot has gate -inf and position -1.
Held = tuple[float, int, int]
# Slot -> (gate, position).
Written = dict[int, tuple[float, int]]


class HeadKeys:
    """The keys of one head of one sequence, as `find_keys` finds them.

    now: position of the next key.  last_loss: as in `DynamicMaskState`.
    written: what the tensors of the state do not have yet; shared by the heads of a run.
    recent: the recent keys, oldest first; an empty slot for each position without one.
    lowest: a heap of the last keys of the top-w in rank, empty slots first.  A key of the top-w is in it if and only if it
        does not rank before `bound`, a (gate, position).
    """

    __slots__ = ("bound", "last_loss", "lowest", "now", "recent", "threshold", "written")

    def __init__(self, now: int, last_loss: int, threshold: float, written: Written) -> None:
        self.now, self.last_loss, self.threshold, self.written = now, last_loss, threshold, written
        self.recent: deque[Held] = deque()
        self.lowest: list[Held] = []
        self.bound: tuple[float, int] = (math.inf, NEVER)

    def copy(self, written: Written) -> "HeadKeys":
        """The same with containers of its own and this `written`."""
        copy = HeadKeys(self.now, self.last_loss, self.threshold, written)
        copy.recent, copy.lowest, copy.bound = self.recent.copy(), self.lowest.copy(), self.bound
        return copy

    def insert(self, gate: float) -> int:
        """Insert the next key, whose gate is finite; its slot, or -1 where it is not kept.

        `lowest` must not be empty.
        """
        now = self.now
        self.now = now + 1
        if self.recent:
            rival, position, slot = self.recent.popleft()
            if position >= 0:
                slot = self._compete(rival, position, slot)
            self.recent.append((gate, now, slot))
        else:
            slot = self._compete(gate, now, -1)
            if slot < 0:
                return -1
        self.written[slot] = (gate, now)
        return slot

    def _compete(self, gate: float, position: int, slot: int) -> int:
        """The slot that is free after this key, the newest that competes, has competed; -1 for none.

        slot: of the key; -1 = it has none, and takes the slot of the key that leaves.
        """
        lowest, at, last = self.lowest[0]
        if not lowest <= gate > self.threshold:
            last, at = slot, slot
        elif (gate, position) < self.bound:
            heapreplace(self.lowest, (gate, position, last if slot < 0 else slot))
        else:
            heappop(self.lowest)
        if at >= 0:
            self.last_loss = self.now - 1
        return last


def heads_at(state: DynamicMaskState, written: Written) -> list[HeadKeys]:
    """The heads [B Hkv] of a state, without keys."""
    threshold = state.policy.threshold if state.selection == "threshold" else -math.inf
    length = [now for now in state.length.tolist() for _ in range(state.position.shape[1])]
    losses = state.last_loss.flatten().tolist()
    return [HeadKeys(now, loss, threshold, written) for now, loss in zip(length, losses, strict=True)]


def find_keys(heads: list[HeadKeys], state: DynamicMaskState) -> None:
    """Find `recent` and `lowest` of the heads, whose keys are in the slots of this state.  They have all of their sinks."""
    batch, count, slots = state.position.shape
    position, order = state.position.sort(-1)  # empty slots, sinks, keys that compete, recent keys
    gate = state.gate.gather(-1, order)
    slot = order + torch.arange(0, order.numel(), slots, device=order.device).view(batch, count, 1)
    # The first empty slots are not for the top-w: those that only wider heads have, and those of missing recent keys.
    spare: Tensor | int = 0
    if isinstance(state.window_size, tuple):
        spare = state.widest - state.policy.windows(order.device)
    excluded = (position <= state.last_sink[..., None]) & (position >= 0)
    if state.recent:
        now = torch.tensor([head.now for head in heads], device=order.device).view(batch, count, 1)
        if any(_has_gaps(head) for head in heads):
            spare = spare + _find_recent(heads, state, now, gate, position, slot)
        excluded = excluded | (position >= now - state.recent)
    if isinstance(spare, Tensor):
        excluded = excluded | ((position < 0) & (torch.arange(slots, device=order.device) < spare))
    # By gate, and of equal gates by position.
    column = gate.masked_fill(excluded, math.inf).sort(dim=-1, stable=True).indices[..., :COUNT]
    position = position.masked_fill(excluded, NEVER)
    for head, row in zip(heads, _rows(gate, position, slot, column), strict=True):
        head.lowest = [held for held in row if held[1] != NEVER]
        head.bound = head.lowest[-1][:2] if len(head.lowest) == COUNT < state.widest else (math.inf, NEVER)


def _has_gaps(head: HeadKeys) -> bool:
    return not head.recent or any(position < 0 for _, position, _ in head.recent)


def _find_recent(
    heads: list[HeadKeys], state: DynamicMaskState, now: Tensor, gate: Tensor, position: Tensor, slot: Tensor
) -> Tensor:
    """Find `recent` of the heads.  Returns how many of their last positions have no key, [B, Hkv, 1].

    These get the first empty slots.
    now: [B, Hkv, 1], position of the next key.  gate, position, slot: [B, Hkv, C], in order of position.
    """
    wanted = now - state.recent + torch.arange(state.recent, device=now.device)
    column = torch.searchsorted(position, wanted)
    missing = position.gather(-1, column.clamp(max=position.shape[-1] - 1)) != wanted
    missing = missing | (wanted <= state.last_sink[..., None])
    column = torch.where(missing, missing.cumsum(-1) - 1, column)
    for head, row in zip(heads, _rows(gate, position, slot, column), strict=True):
        head.recent = deque(row)
    return missing.sum(-1, keepdim=True)


def _rows(gate: Tensor, position: Tensor, slot: Tensor, column: Tensor) -> list[list[Held]]:
    """For each head [B Hkv] the (gate, position, slot) in its columns; the tensors are [B, Hkv, ...]."""
    columns = (tensor.gather(-1, column).flatten(0, 1).tolist() for tensor in (gate, position, slot))
    return [list(zip(*row, strict=True)) for row in zip(*columns, strict=True)]


def is_top_of_equal_gates(state: DynamicMaskState) -> bool:
    """Whether each head holds one key for each position from its first key after the sinks on, all with a gate of 0."""
    others = state.position > state.last_sink[..., None]
    first = torch.where(others, state.position, state.length[:, None, None]).amin(-1)
    gapless = others.sum(-1) == state.length[:, None] - first
    return bool(gapless.all()) and not bool(((state.gate != 0) & (state.position >= 0)).any())
