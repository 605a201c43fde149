"""A run of tokens that are decoded one by one on a CPU, without derivatives: each writes the slots that it changes, in place.

A token costs more in calls than in arithmetic, so numbers per head are Python's (`head_keys.py`).  What attention does not
read (gates, positions and lengths) is written when `state` is called.

A run ends, and `one_token.py` continues, where a token is not plain: its gates are not finite, or it may become a sink.
A sliding window is a run where it is the top-w of equal gates: where the gates are 0, and no token in it is masked.
"""

import math

import torch
from torch import Tensor

from flexdma.state.cpu_attention import attention_of_one
from flexdma.state.dynamic_mask_state import DynamicMaskState
from flexdma.state.head_keys import HeadKeys, Written, find_keys, heads_at, is_top_of_equal_gates
from flexdma.state.layout import SLOTS
from flexdma.state.one_query import logit_bias

# How far gates may rise above the number that is subtracted from them.  Float32 rounds a difference of 4 by 2e-7.
RISE = 4.0
# The tensors of a state that belong to its run.
OWN = (*SLOTS, "bias", "length", "real_length", "last_sink", "last_loss")


class TokenRun:
    """The run that begins at a state.  It owns the state's slots, and is valid until anything else writes to them.

    before: the state at which it begins, without its run: states hold runs, and a cycle would keep the tensors of each
        token's state until Python collects garbage.
    forgotten: of `state`; the caller sets it for gates that have it.
    """

    _heads: list[HeadKeys]  # one for each row of [B Hkv]
    # [B, Hkv, 1, C]: what is added to logits, minus `_references`, a number per head; -inf for empty slots.
    _bias: Tensor
    _references: list[float]
    # For a state with biases: those that its tensor does not have yet, by slot; and the slot of each head's best sum, which
    # may leave while it is the best.
    _new_biases: dict[int, float]
    _best: list[int]
    # Whether the last keys in rank of each head are known.
    _is_sorted: bool

    def __init__(self, state: DynamicMaskState) -> None:
        """Use `run_of`, which checks the state."""
        self.forgotten = state.forgotten
        self._has_threshold = state.selection == "threshold"
        self._is_sliding = state.selection == "sliding"
        self._written: Written = {}
        self._new_biases, self._best = {}, []
        self._heads = heads_at(state, self._written)
        self._begin_at(state)

    def _begin_at(self, state: DynamicMaskState) -> None:
        self.before = state._with(_run=None)
        # Views, made once.
        self._key, self._value, self._gate, self._position = (getattr(state, name).flatten(0, 2) for name in SLOTS)
        self._added = None if state.bias is None else state.bias.flatten(0, 2)
        self._tokens, self._has_lost = 0, False
        real = state.real_length.tolist()
        self._real_length = real[0] if len(set(real)) == 1 else None
        self._count_writes()

    def _count_writes(self) -> None:
        self._versions = _versions(self.before)

    def is_valid(self) -> bool:
        """Whether nothing else has written to the state; always False for tensors made in inference mode."""
        return self._versions is not None and not self.is_overwritten()

    def is_overwritten(self) -> bool:
        """Whether something else has written to the state; always False for tensors made in inference mode."""
        return self._versions is not None and self._versions != _versions(self.before)

    def is_writable(self) -> bool:
        """Whether a token may be inserted: torch forbids writes outside inference mode to tensors that were made in it."""
        return torch.is_inference_mode_enabled() or not self._key.is_inference()

    def insert(self, key: Tensor, value: Tensor, gate: Tensor, bias: Tensor | None = None) -> bool:
        """One more token of the same documents; False, with nothing changed, where the run ends before it.  O(1) time.

        key [B, Hkv, 1, D], value [B, Hkv, 1, Dv], gate [B, Hkv, 1]; bias [B, Hkv, 1] where the state has biases.
        """
        gates: list[float] = gate.flatten().tolist()
        added = gates if bias is None else (gate + bias).flatten().tolist()
        # A sum that overflows only ends the run.
        if (
            not math.isfinite(sum(gates) + sum(added))
            or (self._is_sliding and any(gates))
            or not (self._is_sorted or self._sort())
        ):
            return False
        rows, places, biases, is_stale, lost = [], [], [], False, False
        for row, (head, number) in enumerate(zip(self._heads, gates, strict=True)):
            place, difference = head.insert(number), added[row] - self._references[row]
            if place >= 0:
                rows.append(row)
                places.append(place)
                biases.append(difference)
                is_stale = is_stale or difference > RISE
                if bias is not None:
                    is_stale = is_stale or place == self._best[row]
            lost = lost or head.last_loss == head.now - 1
            self._is_sorted = self._is_sorted and bool(head.lowest)
        if bias is not None:
            numbers: list[float] = bias.flatten().tolist()
            self._new_biases.update(zip(places, (numbers[row] for row in rows), strict=True))
        self._tokens += 1
        self._has_lost = self._has_lost or lost
        if places:
            key, value = key.reshape(-1, key.shape[3]), value.reshape(-1, value.shape[3])
            if len(places) < len(gates):
                some = torch.tensor(rows, device=gate.device)
                key, value = key.index_select(0, some), value.index_select(0, some)
            slots = torch.tensor(places, device=gate.device)
            self._key.index_copy_(0, slots, key)
            self._value.index_copy_(0, slots, value)
            self._bias_of_slots.index_copy_(0, slots, torch.tensor(biases, dtype=self._bias.dtype, device=gate.device))
        # The best key of a head does not leave before a better one comes, unless it is below a threshold.
        if is_stale or (lost and self._has_threshold):
            self._find_references()
        return True

    def attention(self, query: Tensor, scale: float) -> Tensor:
        """Attention [B, Hq, 1, Dv] of query [B, Hq, 1, D] to the keys so far.  O(w) time."""
        return attention_of_one(query, self.before.key, self.before.value, self._bias, scale)

    def state(self) -> DynamicMaskState:
        """The state after the tokens so far.  The next token overwrites its slots."""
        before = self.before
        if self._tokens:
            self._write()
            last_loss = before.last_loss
            if self._has_lost:
                losses = [head.last_loss for head in self._heads]
                last_loss = torch.tensor(losses, device=last_loss.device).view(last_loss.shape)
            self.before = before._with(
                length=before.length + self._tokens,
                real_length=before.real_length + self._tokens,
                last_loss=last_loss,
                forgotten=self.forgotten,
            )
            if self._real_length is not None:
                self._real_length += self._tokens
            self._tokens, self._has_lost = 0, False
        return self.before._with(_run=self)

    def continues(self, state: DynamicMaskState) -> bool:
        """Whether the next token of the run is the next token of this state: its tensors are those that `state` returned."""
        mine = self.before
        if self._tokens or not self.is_valid() or any(getattr(mine, name) is not getattr(state, name) for name in OWN):
            return False
        self.before, self.forgotten = state._with(_run=None), state.forgotten
        return True

    @property
    def real_length(self) -> int | Tensor:
        """That of `state`, as an int where it is the same for all sequences."""
        if self._real_length is not None:
            return self._real_length + self._tokens
        return self.before.real_length + self._tokens

    def copied(self, after: DynamicMaskState) -> "TokenRun":
        """The same for a state whose slots are copies of this one's `state`."""
        copy = object.__new__(TokenRun)
        written: Written = {}  # nothing is left to write
        copy.__dict__.update(
            self.__dict__, _written=written, _new_biases={}, _heads=[head.copy(written) for head in self._heads]
        )
        copy._set_bias(self._bias.clone())
        copy._begin_at(after)
        return copy

    def _write(self) -> None:
        """Write what the tensors of the state do not have yet."""
        written = self._written
        if not written:
            return
        device, overwritten = self._position.device, self.is_overwritten()
        slots = torch.tensor(list(written), device=device)
        gates, positions = zip(*written.values(), strict=True)
        # What tokens have left to write, also where the mode has ended since.
        with torch.inference_mode(self._key.is_inference() or torch.is_inference_mode_enabled()):
            self._gate.index_copy_(0, slots, torch.tensor(gates, dtype=self._gate.dtype, device=device))
            self._position.index_copy_(0, slots, torch.tensor(positions, device=device))
            if self._added is not None:
                biases = [self._new_biases[slot] for slot in written]
                self._added.index_copy_(0, slots, torch.tensor(biases, dtype=self._added.dtype, device=device))
                self._new_biases.clear()
        written.clear()
        if not overwritten:
            self._count_writes()

    def _sort(self) -> bool:
        """Find the keys of the heads and the references; False where a gate is not finite."""
        self._is_sorted = self._find_references()
        if self._is_sorted:
            find_keys(self._heads, self.before)
        return self._is_sorted

    def _find_references(self) -> bool:
        """Subtract the best number of each head; False where one is not finite."""
        self._write()
        added = logit_bias(self.before).unsqueeze(2)
        if self._added is None:
            best = added.amax(-1, keepdim=True)
        else:
            best, slot = added.max(-1, keepdim=True)
            self._best = [row * added.shape[-1] + index for row, index in enumerate(slot.flatten().tolist())]
        self._references = best.flatten().tolist()
        computed = torch.float64 if self._key.dtype == torch.float64 else torch.float32
        # A tensor made in inference mode could not be written to by a later token outside of it.
        with torch.inference_mode(False):
            self._set_bias((added - best).to(computed))
        return math.isfinite(sum(self._references))

    def _set_bias(self, bias: Tensor) -> None:
        self._bias, self._bias_of_slots = bias, bias.view(-1)


def run_of(state: DynamicMaskState) -> TokenRun | None:
    """The run that the last token left at this state, else a new one; None where the next token does not begin one.

    O(w log w) time for a new one.
    """
    run = state._run
    if run is not None and run.continues(state):
        return run
    if state.position.numel() == 0 or (state.selection == "sliding" and not is_top_of_equal_gates(state)):
        return None
    if state.sinks:
        sinks = (state.position >= 0) & (state.position <= state.last_sink[..., None])
        if bool((sinks.sum(-1) < state.sinks).any()):
            return None  # the next token may be one
    run = TokenRun(state)
    return run if run._sort() else None


def _versions(state: DynamicMaskState) -> tuple[int, ...] | None:
    """How often the tensors that a run reads only at its beginning were written to; None where torch does not count."""
    read = (state.gate, state.position, state.last_sink, *(() if state.bias is None else (state.bias,)))
    return None if any(tensor.is_inference() for tensor in read) else tuple(tensor._version for tensor in read)


def has_sizes_of(
    state: DynamicMaskState, query: Tensor, key: Tensor, value: Tensor, gate: Tensor, bias: Tensor | None = None
) -> bool:
    """Whether this is one token with the sizes of the state, and gates and biases of its dtypes."""
    batch, heads, _slots, size = state.key.shape
    rows = query.shape
    return (
        key.shape == (batch, heads, 1, size)
        and value.shape == (batch, heads, 1, state.value.shape[3])
        and gate.shape == (batch, heads, 1)
        and gate.dtype is state.gate.dtype
        and (bias is None) == (state.bias is None)
        and (bias is None or state.bias is None or (bias.shape == gate.shape and bias.dtype is state.bias.dtype))
        and len(rows) == 4
        and rows[0] == batch
        and rows[2] == 1
        and rows[3] == size
        and rows[1] % heads == 0
        and rows[1] > 0
    )
