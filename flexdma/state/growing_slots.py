"""The slots of a GrowingState: how many, which keys they hold, and their shapes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexdma.packing import along_keys
from flexdma.rounding import power_of_two_from
from flexdma.state.layout import EMPTY, SLOTS, StateLayout, state_layout

# The tensors with one entry per slot, beside `bias`, which a state may not have.
GROWING_SLOTS = (*SLOTS, "expiry")
FEWEST_SLOTS = 16


def slots_for(needed: int, now: int) -> int:
    """The number of slots for this many keys, where there are `now` slots: a power of two, from one to four slots per key."""
    fewest = max(FEWEST_SLOTS, power_of_two_from(needed))
    if now < fewest:
        return fewest
    return now if now <= 2 * fewest else 2 * fewest


def first_places(chosen: Tensor, slots: int) -> Tensor:
    """[B, Hkv, slots] int64: the places of the chosen of [B, Hkv, M], in order; -1 after them.  O(M) time."""
    places = torch.arange(chosen.shape[-1], device=chosen.device).expand(chosen.shape)
    # A cell beyond the slots collects the places that are not chosen.
    slot = torch.where(chosen, chosen.cumsum(-1) - 1, slots).clamp(max=slots)
    found = torch.full((*chosen.shape[:-1], slots + 1), -1, device=chosen.device)
    return found.scatter(-1, slot, places)[..., :slots]


def keys_at(place: Tensor, keys: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tensors of slots with the keys at these places [B, Hkv, C] of [B, Hkv, M, ...]; -1 = an empty slot."""
    held, place = place >= 0, place.clamp(min=0)
    gathered = {name: along_keys(tensor, place) for name, tensor in keys.items()}
    empty = {"key": 0.0, "value": 0.0, "bias": 0.0} | {name: EMPTY[name] for name in ("gate", "position", "expiry")}
    return {
        name: tensor.masked_fill(~held.view(*held.shape, *[1] * (tensor.dim() - 3)), empty[name])
        for name, tensor in gathered.items()
    }


def growing_layout(
    slots: tuple[int, int, int], size: int, value_size: int, dtype: torch.dtype, gate_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> StateLayout:  # fmt: skip
    """Shape and dtype of each tensor, for slots (B, Hkv, C), D and Dv.  bias_dtype: None = a state without biases."""
    layout = state_layout(slots, size, value_size, dtype, gate_dtype, bias_dtype)
    return layout | {"expiry": (slots, torch.float64), "peak": (slots[:2], torch.int64)}
