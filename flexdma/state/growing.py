"""GrowingState: the living keys of a policy that bounds no number of keys.

Keys above a threshold, all keys, keys that die a delay after a low score (DMS, arXiv 2506.05345; KVzap, arXiv 2601.07891),
keys whose decay falls below a bound (FoX with pruning, arXiv 2504.06949): none of these competes with another key, so no w
bounds them.  Each key has an expiry instead, known at its birth, and dies when a clock passes it.

A state holds living keys only.  Slots of dead keys are used again, and the number of slots follows the number of living keys
in powers of two, so that a context of N tokens has O(log N) shapes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from flexdma import checks
from flexdma.lifespans import STATEFUL_SELECTIONS, Selection
from flexdma.rounding import power_of_two_from
from flexdma.state.growing_slots import FEWEST_SLOTS, GROWING_SLOTS, growing_layout, slots_for
from flexdma.state.layout import (
    StateLayout,
    empty_tensors,
    first_places,
    keys_at,
    refuse_difference,
    refuse_sizes,
    slot_tensors,
)
from flexdma.state.rollback import counts_at, length_before
from flexdma.state.value import State, register

# Where the caller of `growing_attention` gives lifetimes, or expiries and a clock.
GIVEN = ("lifetime", "clock")


@register
@dataclass(frozen=True, eq=False)
class GrowingState(State):
    """The state of `dynamic_mask_attention` with window_size=None, and of `growing_attention`; `empty` makes the first.

    C slots per KV head, a power of two, in any order: at most four for each key that the fullest head of the batch holds, at
    least FEWEST_SLOTS.  A key is held until the first query that does not see it.  The key and value of an empty slot are not
    read.

    key, value, gate, position, length, real_length, last_padding, document, last_sink, last_loss, forgotten, bias: see
        `State`.
    expiry: [B, Hkv, C] float64, the last reading of the clock at which the key is visible; inf = to the end of its document.
        The clock reads the position of the query, or what the caller gives (selection="clock").
    peak: [B, Hkv] int64, the largest number of keys that one query has seen so far.
    selection, sinks, recent: of the operator; "lifetime" or "clock" for a state of `growing_attention`.
    """

    expiry: Tensor
    peak: Tensor
    sinks: int = 0
    recent: int = 0
    selection: str = "threshold"
    # Not a field: empty slots of the fullest head, at least; None = not counted.
    _room: ClassVar[int | None] = None

    @classmethod
    def empty(
        cls,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        selection: str = "threshold",
        sinks: int = 0,
        recent: int = 0,
        slots: int = FEWEST_SLOTS,
        dtype: torch.dtype = torch.float32,
        gate_dtype: torch.dtype = torch.float32,
        bias_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "GrowingState":
        """The state before the first token.

        batch_size, num_kv_heads, head_dim, value_dim: B, Hkv, D and Dv (default D).
        selection, sinks, recent: as in `dynamic_mask_attention`, or selection="lifetime" or "clock" for `growing_attention`.
        slots: C, rounded up to a power of two.
        dtype: of keys and values.  gate_dtype: float64 for float64 gates, float32 for all others.
        bias_dtype: of biases, as gate_dtype; None = a state without them.
        Raises ValueError or TypeError naming the argument.
        """
        value_dim = head_dim if value_dim is None else value_dim
        refuse_sizes(batch_size, num_kv_heads, head_dim, value_dim, dtype, gate_dtype, bias_dtype)
        checks.positive_int("slots", slots)
        if selection in GIVEN:
            for name, count in (("sinks", sinks), ("recent", recent)):
                if count != 0:
                    raise ValueError(f"{name}: expected 0 with selection={selection!r}, got {count!r}")
        else:
            Selection.of(selection, None, sinks, recent, heads=num_kv_heads, kinds=STATEFUL_SELECTIONS)
        slots = max(FEWEST_SLOTS, power_of_two_from(slots))
        sizes = (batch_size, num_kv_heads, slots)
        layout = growing_layout(sizes, head_dim, value_dim, dtype, gate_dtype, bias_dtype)
        return cls(**empty_tensors(layout, device), sinks=sinks, recent=recent, selection=selection)

    @property
    def living(self) -> Tensor:
        """[B, Hkv] int64, the number of keys that each head holds."""
        return (self.position >= 0).sum(-1)

    def reserve(self, tokens: int) -> "GrowingState":
        """The state with room for the keys of `tokens` more tokens, in more slots, or in fewer, only where it must or can.

        A call outside of torch.compile does this itself.  In a compiled function the number of slots is a shape, so reserve
        before it; a compiled call that finds no room raises.  Reads the number of living keys from the device, unless the
        last count shows that there is room.  A change of the slots copies all of them.
        """
        checks.positive_int("tokens", tokens, 0)
        if self._room is not None and self._room >= tokens:
            return self
        living = int(self.living.max()) if self.position.numel() else 0
        slots = slots_for(living + tokens, self.position.shape[-1])
        state = self if slots == self.position.shape[-1] else in_slots(self, slots)
        return state._with(_room=slots - living)

    def put(self, rows: Tensor, other: "GrowingState") -> "GrowingState":
        """As `DynamicMaskState.put`; the number of slots becomes the larger one of both states."""
        if not isinstance(other, GrowingState):
            raise TypeError(f"other: expected a GrowingState, got {type(other).__name__}")
        slots = max(self.position.shape[-1], other.position.shape[-1])
        return State.put(in_slots(self, slots), rows, in_slots(other, slots))

    def restore(self, saved: "GrowingState") -> "GrowingState":
        """As `DynamicMaskState.restore`; the number of slots may differ."""
        if isinstance(saved, GrowingState):
            refuse_other(saved, "saved", self._layout(), self.options(), self.length.device)
            return saved.checkpoint()
        raise TypeError(f"saved: expected a GrowingState, got {type(saved).__name__}")

    def crop(self, tokens: int | Tensor) -> "GrowingState":
        """The state before the last `tokens` tokens, one int or one per sequence [B] int64; `peak` stays.

        Raises ValueError where a visible key has died since, where one of these tokens is padded, and with forget gates; take
        a `checkpoint()` first in these cases.  With recent=0 and one document no key of a threshold dies.  Synchronises with
        the device.
        """
        length = length_before(self, tokens)
        held = (self.position >= 0) & (self.position < length[:, None, None])
        is_sink = held & (self.position <= self.last_sink[..., None])
        return replace(
            self,
            **counts_at(self, length),
            gate=self.gate.masked_fill(~held, float("-inf")),
            position=self.position.masked_fill(~held, -1),
            bias=None if self.bias is None else self.bias.masked_fill(~held, 0.0),
            last_sink=torch.where(is_sink, self.position, -1).amax(-1),
        )


def growing_options(policy: Selection) -> dict[str, Any]:
    """The options of a state with this selection, by name."""
    return {"sinks": policy.sinks, "recent": policy.recent, "selection": policy.kind}


def in_slots(state: GrowingState, slots: int) -> GrowingState:
    """The same keys in this many slots, which must be enough for every head."""
    if slots == state.position.shape[-1]:
        return state
    place = first_places(state.position >= 0, slots)
    return replace(state, **keys_at(place, slot_tensors(state, GROWING_SLOTS)))


def refuse_other(
    state: GrowingState, name: str, layout: StateLayout, options: Mapping[str, Any], device: torch.device
) -> None:
    """Raise unless the state has this layout, but for the number of slots, these options and this device."""
    slots, names = state.position.shape[2:3], (*GROWING_SLOTS, *(["bias"] if "bias" in layout else []))
    layout = layout | {of: ((*layout[of][0][:2], *slots, *layout[of][0][3:]), layout[of][1]) for of in names}
    refuse_difference(name, state, layout, dict(options), device)


def check_growing_state(
    state: object, key: Tensor, value: Tensor, gate_dtype: torch.dtype, options: Mapping[str, Any],
    bias_dtype: torch.dtype | None,
) -> None:  # fmt: skip
    """Raise unless `state` is a GrowingState that fits these keys and values, dtypes of gates and biases, and options."""
    if not isinstance(state, GrowingState):
        raise TypeError(f"state: expected a GrowingState, as the selection has no bound, got {type(state).__name__}")
    layout = growing_layout((*key.shape[:2], 0), key.shape[3], value.shape[3], key.dtype, gate_dtype, bias_dtype)
    refuse_other(state, "state", layout, options, key.device)
