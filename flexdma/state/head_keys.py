"""The keys of the heads of a run as Python numbers: which slot the next key takes, and which slot it empties.

One sort finds the last COUNT keys of each head in rank.  The tokens after it replace those, and join the list where they rank
low enough.
"""

import math
from heapq import heappop, heapreplace
from typing import NamedTuple

import torch

from flexdma.lifespans.ranking import NEVER
from flexdma.state.dynamic_mask_state import DynamicMaskState
from flexdma.state.one_token import beyond_window

# Keys of each head that one sort finds.
COUNT = 32
EMPTY = (float("-inf"), -1)


class Later(NamedTuple):
    """What the tensors of a state do not have yet, of all heads of a run.

    written: slot -> (gate, position).
    moved: slot -> the slot whose key and value are its own; absent = the same.  A key that leaves the top-w, but stays as a
        sink or a recent key, gets another slot without a copy.
    """

    written: dict[int, tuple[float, int]]
    moved: dict[int, int]


class HeadKeys:
    """The keys of one head of one sequence.  Slots are numbers in [B Hkv C].

    now: position of the next key.  last_sink, last_loss: as in `DynamicMaskState`.
    lowest: a heap of (gate, position, slot) of the last keys of the top-w in rank, empty slots first as EMPTY.  A key of the
        top-w is in it if and only if it does not rank before `bound`, a (gate, position).
    later: shared by the heads of a run.
    others: position -> slot of the recent keys outside the top-w, without sinks.  free: empty slots outside the top-w.
    emptied: the slot whose key and value the last `insert` has made those of no key; -1 for none.
    """

    __slots__ = (
        "bound", "emptied", "free", "last_loss", "last_sink", "later", "lowest", "now", "others", "recent", "threshold",
    )  # fmt: skip

    def __init__(
        self, first_slot: int, outside: list[int], now: int, last_sink: int, last_loss: int, recent: int, threshold: float,
        later: Later,
    ) -> None:  # fmt: skip
        """outside: the positions in the slots outside the top-w, from `first_slot` on; -1 for an empty one."""
        self.now, self.last_sink, self.last_loss = now, last_sink, last_loss
        self.recent, self.threshold, self.later = recent, threshold, later
        slots = list(enumerate(outside, first_slot))
        self.others = {position: slot for slot, position in slots if position > last_sink}
        self.free = [slot for slot, position in slots if position < 0]
        self.lowest: list[tuple[float, int, int]] = []
        self.bound = EMPTY
        self.emptied = -1

    def copy(self, later: Later) -> "HeadKeys":
        """The same with containers of its own and this `later`."""
        copy = object.__new__(HeadKeys)
        for name in self.__slots__:
            own = getattr(self, name)
            setattr(copy, name, own.copy() if isinstance(own, list | dict) else own)
        copy.later = later
        return copy

    def insert(self, gate: float) -> int:
        """Insert the next key, whose gate is finite; the slot where its key and value go, -1 where it is not kept.

        `lowest` must not be empty.
        """
        now, (written, moved) = self.now, self.later
        expired = now - self.recent
        empty = self.others.pop(expired, -1)
        lost = empty >= 0
        lowest, position, slot = self.lowest[0]
        if lowest <= gate > self.threshold:
            if (gate, now) < self.bound:
                heapreplace(self.lowest, (gate, now, slot))
            else:
                heappop(self.lowest)
            if position >= 0 and (position > expired or position <= self.last_sink):
                other = self.free.pop() if empty < 0 else empty
                empty = -1
                if position > self.last_sink:
                    self.others[position] = other
                written[other] = (lowest, position)
                moved[slot], moved[other] = moved.get(other, other), moved.get(slot, slot)
            else:
                lost = lost or position >= 0
        elif self.recent:
            slot = self.free.pop() if empty < 0 else empty
            empty = -1
            self.others[now] = slot
        else:
            slot = -1
        self.now = now + 1
        if lost:
            self.last_loss = now
        self.emptied = empty
        if empty >= 0:
            self.free.append(empty)
            written[empty] = EMPTY
            self.emptied = moved.get(empty, empty)
        if slot < 0:
            return -1
        written[slot] = (gate, now)
        return moved.get(slot, slot)


def heads_at(state: DynamicMaskState, later: Later) -> list[HeadKeys]:
    """The heads [B Hkv] of a state, without `lowest`."""
    _, heads, slots = state.position.shape
    threshold = state.policy.threshold if state.selection == "threshold" else -math.inf
    outside = state.position[..., state.widest :].flatten(0, 1).tolist()
    length = [now for now in state.length.tolist() for _ in range(heads)]
    sinks, losses = (tensor.flatten().tolist() for tensor in (state.last_sink, state.last_loss))
    return [
        HeadKeys(row * slots + state.widest, *numbers, state.recent, threshold, later)
        for row, numbers in enumerate(zip(outside, length, sinks, losses, strict=True))
    ]


def find_last(heads: list[HeadKeys], state: DynamicMaskState) -> bool:
    """Find `lowest` of the heads of this state; False where one of their gates is not a number."""
    level, position = state.gate[..., : state.widest], state.position[..., : state.widest]
    if isinstance(state.window_size, tuple):
        beyond = beyond_window(state)
        level, position = level.masked_fill(beyond, math.inf), position.masked_fill(beyond, NEVER)
    # By gate, and of equal gates by position; NaN comes last.
    by_position = position.argsort(dim=-1)
    level, by_level = level.gather(-1, by_position).sort(dim=-1, stable=True)
    slot = by_position.gather(-1, by_level[..., :COUNT])
    columns = (level[..., :COUNT], position.gather(-1, slot), slot)
    rows = zip(*(column.flatten(0, 1).tolist() for column in columns), strict=True)
    first, all_numbers = 0, True
    for head, row in zip(heads, rows, strict=True):
        head.lowest = [(gate, at, first + slot) for gate, at, slot in zip(*row, strict=True) if at != NEVER]
        head.bound = head.lowest[-1][:2] if len(head.lowest) == COUNT < state.widest else (math.inf, NEVER)
        all_numbers = all_numbers and not any(math.isnan(gate) for gate, _, _ in head.lowest)
        first += state.position.shape[2]
    return all_numbers


def is_top_of_equal_gates(state: DynamicMaskState) -> bool:
    """Whether the window of each head holds one key for each position from its first key on, all with a gate of 0."""
    position = state.position[..., : state.widest]
    held = position >= 0
    first = torch.where(held, position, state.length[:, None, None]).amin(-1)
    gapless = held.sum(-1) == state.length[:, None] - first
    return bool(gapless.all()) and not bool(((state.gate != 0) & (state.position >= 0)).any())
