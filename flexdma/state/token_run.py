"""A run of tokens that are decoded one by one on a CPU, without derivatives: each writes the slots that it changes, in place.

A token costs more in calls than in arithmetic, so numbers per head are Python's.  One sort finds the last COUNT keys of each
head in rank.  The tokens after it overwrite those, and join the list where they rank low enough.  Tensors that attention
does not read (positions, lengths) are written when `state` is called.

A run ends, and `one_token.py` continues, where a token is not plain: with a gate that is not finite, or where it replaces a
sink, or may become one.
"""

import math
from heapq import heappop, heapreplace

import torch
from torch import Tensor

from flexdma.lifespans.ranking import NEVER
from flexdma.state.cpu_attention import attention_of_one
from flexdma.state.dynamic_mask_state import DynamicMaskState
from flexdma.state.layout import SLOTS
from flexdma.state.one_token import beyond_window

# Keys of each head that one sort finds.
COUNT = 32
# The tensors of a state that belong to its run.
OWN = (*SLOTS, "length", "real_length", "last_sink", "last_loss")


class TokenRun:
    """The run that begins at a state.  It owns the state's slots, and is valid until anything else writes to them.

    before: the state at which it begins.
    forgotten: of `state`; the caller sets it for gates that have it.
    """

    # For each row of [B Hkv] a heap of (gate, position, slot), empty slots first as (-inf, -1, slot).  A key of the top-w is
    # in it if and only if it does not rank before the row's bound (gate, position).
    _rows: list[list[tuple[float, int, int]]]
    _bounds: list[tuple[float, int]]

    def __init__(self, state: DynamicMaskState) -> None:
        """Use `run_of`, which checks the state."""
        self.forgotten = state.forgotten
        self._threshold = state.policy.threshold if state.selection == "threshold" else -math.inf
        self._last_sink: list[int] = state.last_sink.flatten().tolist()
        self._begin_at(state)

    def _begin_at(self, state: DynamicMaskState) -> None:
        self.before = state
        self._heads, self._size = state.position.shape[1:]
        # Views, made once.
        self._key, self._value, self._gate, self._position = (getattr(state, name).flatten(0, 2) for name in SLOTS)
        self._gate_of_slots = state.gate.unsqueeze(2)
        self._tokens = 0
        self._first: list[int] = [now for now in state.length.tolist() for _ in range(self._heads)]
        self._losses: dict[int, int] = {}  # row -> its latest loss
        self._positions: dict[int, int] = {}  # slot of [B Hkv C] -> position not yet written
        self._count_writes()

    def _count_writes(self) -> None:
        gate, position, last_sink = self.before.gate, self.before.position, self.before.last_sink
        self._versions = None if gate.is_inference() else (gate._version, position._version, last_sink._version)

    def is_valid(self) -> bool:
        """Whether nothing else has written to the state; always False for tensors made in inference mode."""
        return self._versions is not None and not self.is_overwritten()

    def is_overwritten(self) -> bool:
        """Whether something else has written to the state; always False for tensors made in inference mode."""
        state = self.before
        return self._versions is not None and self._versions != (
            state.gate._version, state.position._version, state.last_sink._version
        )  # fmt: skip

    def insert(self, key: Tensor, value: Tensor, gate: Tensor) -> bool:
        """One more token of the same documents; False, with nothing changed, where the run ends before it.  O(1) time.

        key [B, Hkv, 1, D], value [B, Hkv, 1, Dv], gate [B, Hkv, 1].
        """
        gate = gate.reshape(-1)
        gates: list[float] = gate.tolist()
        # A sum that overflows only ends the run.
        if not math.isfinite(sum(gates)) or not (all(self._rows) or self._sort()):
            return False
        replaced = []
        for index, (row, number) in enumerate(zip(self._rows, gates, strict=True)):
            lowest, position, _ = row[0]
            if lowest <= number > self._threshold:
                if 0 <= position <= self._last_sink[index]:
                    return False
                replaced.append(index)
        self._tokens += 1
        if not replaced:
            return True
        places, is_best, size = [], False, self._size
        for index in replaced:
            row, number, now = self._rows[index], gates[index], self._first[index] + self._tokens - 1
            _, position, slot = row[0]
            if (number, now) < self._bounds[index]:
                heapreplace(row, (number, now, slot))
            else:
                heappop(row)
            if position >= 0:
                self._losses[index] = now
            self._positions[index * size + slot] = now
            places.append(index * size + slot)
            is_best = is_best or number > self._best[index]
        slots = torch.tensor(places, device=gate.device)
        key, value = key.reshape(-1, key.shape[3]), value.reshape(-1, value.shape[3])
        if len(replaced) < len(gates):
            some = torch.tensor(replaced, device=gate.device)
            key, value, gate = (tensor.index_select(0, some) for tensor in (key, value, gate))
        self._key.index_copy_(0, slots, key)
        self._value.index_copy_(0, slots, value)
        self._gate.index_copy_(0, slots, gate)
        if self._versions is not None:
            self._versions = (self._gate._version, *self._versions[1:])
        if is_best:
            self._find_reference()
        return True

    def attention(self, query: Tensor, scale: float) -> Tensor:
        """Attention [B, Hq, 1, Dv] of query [B, Hq, 1, D] to the keys so far.  O(w) time."""
        state = self.before
        return attention_of_one(query, state.key, state.value, self._gate_of_slots - self._reference, scale)

    def state(self) -> DynamicMaskState:
        """The state after the tokens so far.  The next token overwrites its slots."""
        before = self.before
        if self._tokens:
            self._write_positions()
            last_loss = before.last_loss
            if self._losses:
                losses = last_loss.flatten().tolist()
                for row, position in self._losses.items():
                    losses[row] = position
                last_loss = torch.tensor(losses, device=last_loss.device).view(last_loss.shape)
            self.before = before._with(
                length=before.length + self._tokens,
                real_length=before.real_length + self._tokens,
                last_loss=last_loss,
                forgotten=self.forgotten,
                _run=self,
            )
            self._first = [first + self._tokens for first in self._first]
            self._tokens = 0
            self._losses.clear()
        return self.before

    def continues(self, state: DynamicMaskState) -> bool:
        """Whether the next token of the run is the next token of this state: its tensors are those that `state` returned."""
        mine = self.before
        if self._tokens or not self.is_valid():
            return False
        if mine is not state:
            if any(getattr(mine, name) is not getattr(state, name) for name in OWN):
                return False
            self.before, self.forgotten = state, state.forgotten
        return True

    @property
    def real_length(self) -> Tensor:
        """That of `state`."""
        return self.before.real_length + self._tokens if self._tokens else self.before.real_length

    def copied(self, after: DynamicMaskState) -> "TokenRun":
        """The same for a state whose slots are copies of this one's `state`."""
        copy = object.__new__(TokenRun)
        copy.__dict__.update(self.__dict__, _rows=[list(row) for row in self._rows], _best=list(self._best))
        copy._begin_at(after)
        return copy

    def _write_positions(self) -> None:
        if self._positions:
            slots, positions = list(self._positions), list(self._positions.values())
            device, overwritten = self._position.device, self.is_overwritten()
            self._position.index_copy_(0, torch.tensor(slots, device=device), torch.tensor(positions, device=device))
            self._positions.clear()
            if not overwritten:
                self._count_writes()

    def _sort(self) -> bool:
        """Find the last keys in rank and the best gates; False where a best gate or one of these is not a number."""
        self._write_positions()
        state = self.before
        level, position = state.gate[..., : state.widest], state.position[..., : state.widest]
        if isinstance(state.window_size, tuple):
            beyond = beyond_window(state)
            level, position = level.masked_fill(beyond, math.inf), position.masked_fill(beyond, NEVER)
        # By gate, and of equal gates by position; NaN comes last.
        by_position = position.argsort(dim=-1)
        level, by_level = level.gather(-1, by_position).sort(dim=-1, stable=True)
        slot = by_position.gather(-1, by_level[..., :COUNT])
        columns = (level[..., :COUNT], position.gather(-1, slot), slot)
        rows = [
            [entry for entry in zip(*row, strict=True) if entry[1] != NEVER]
            for row in zip(*(column.flatten(0, 1).tolist() for column in columns), strict=True)
        ]
        self._rows = rows
        self._bounds = [row[-1][:2] if len(row) == COUNT < state.widest else (math.inf, NEVER) for row in rows]
        return self._find_reference() and not any(math.isnan(gate) for row in rows for gate, _, _ in row)

    def _find_reference(self) -> bool:
        """Find the best gates; False where one is not finite.  A best key does not leave before a better one comes."""
        self._reference = self._gate_of_slots.amax(-1, keepdim=True)
        self._best: list[float] = self._reference.flatten().tolist()
        return math.isfinite(sum(self._best))


def run_of(state: DynamicMaskState) -> TokenRun | None:
    """The run that the last token left at this state, else a new one; None where the next token does not begin one.

    O(w log w) time for a new one.
    """
    run = state._run
    if run is not None and run.continues(state):
        return run
    if state.recent or state.position.numel() == 0:
        return None
    if state.sinks:
        sinks = (state.position >= 0) & (state.position <= state.last_sink[..., None])
        if bool((sinks.sum(-1) < state.sinks).any()):
            return None  # the next token may be one
    run = TokenRun(state)
    return run if run._sort() else None


def has_sizes_of(state: DynamicMaskState, query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> bool:
    """Whether this is one token with the sizes of the state, and gates of its dtype."""
    batch, heads, _slots, size = state.key.shape
    rows = query.shape
    return (
        key.shape == (batch, heads, 1, size)
        and value.shape == (batch, heads, 1, state.value.shape[3])
        and gate.shape == (batch, heads, 1)
        and gate.dtype is state.gate.dtype
        and len(rows) == 4
        and rows[0] == batch
        and rows[2] == 1
        and rows[3] == size
        and rows[1] % heads == 0
        and rows[1] > 0
    )
