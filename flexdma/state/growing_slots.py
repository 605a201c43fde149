"""The slots of a GrowingState: how many, and their shapes."""

import torch

from flexdma.rounding import power_of_two_from
from flexdma.state.layout import SLOTS, StateLayout, state_layout

# The tensors with one entry per slot, beside `bias`, which a state may not have.
GROWING_SLOTS = (*SLOTS, "expiry")
FEWEST_SLOTS = 16


def slots_for(needed: int, now: int) -> int:
    """The number of slots for this many keys, where there are `now` slots: a power of two, from one to four slots per key."""
    fewest = max(FEWEST_SLOTS, power_of_two_from(needed))
    if now < fewest:
        return fewest
    return now if now <= 2 * fewest else 2 * fewest


def growing_layout(
    slots: tuple[int, int, int], size: int, value_size: int, dtype: torch.dtype, gate_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> StateLayout:  # fmt: skip
    """Shape and dtype of each tensor, for slots (B, Hkv, C), D and Dv.  bias_dtype: None = a state without biases."""
    layout = state_layout(slots, size, value_size, dtype, gate_dtype, bias_dtype)
    return layout | {"expiry": (slots, torch.float64), "peak": (slots[:2], torch.int64)}
