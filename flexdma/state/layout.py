"""The tensors of a state: shapes and dtypes, the keys in their slots, and the check that a given state has them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexdma import checks
from flexdma.packing import along_keys

if TYPE_CHECKING:
    from flexdma.state.carry import Keys
    from flexdma.state.value import State

# Name -> (shape, dtype).
StateLayout = dict[str, tuple[tuple[int, ...], torch.dtype]]
# The tensors with one entry per slot, beside `bias`, which a state may not have.
SLOTS = ("key", "value", "gate", "position")
# Initial values of the tensors of an empty state, where not 0.
EMPTY = {
    "gate": float("-inf"), "position": -1, "last_padding": -1, "last_sink": -1, "last_loss": -1, "expiry": float("-inf")
}  # fmt: skip


def state_layout(
    slots: tuple[int, int, int], size: int, value_size: int, dtype: torch.dtype, gate_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> StateLayout:  # fmt: skip
    """Shape and dtype of each tensor, for slots (B, Hkv, C), D and Dv.  bias_dtype: None = a state without biases."""
    batch, rows = slots[:1], slots[:2]
    return {
        "key": ((*slots, size), dtype),
        "value": ((*slots, value_size), dtype),
        "gate": (slots, gate_dtype),
        "position": (slots, torch.int64),
        "length": (batch, torch.int64),
        "real_length": (batch, torch.int64),
        "last_padding": (batch, torch.int64),
        "document": (batch, torch.int64),
        "last_sink": (rows, torch.int64),
        "last_loss": (rows, torch.int64),
        "forgotten": (rows, torch.float64),
    } | ({} if bias_dtype is None else {"bias": (slots, bias_dtype)})


def slot_tensors(state: "State | Keys", names: tuple[str, ...] = SLOTS) -> dict[str, Tensor]:
    """The tensors with one entry per slot of a state, or per key, by name."""
    tensors = {name: getattr(state, name) for name in names}
    return tensors if state.bias is None else tensors | {"bias": state.bias}


def empty_tensors(layout: StateLayout, device: torch.device | str | None) -> dict[str, Any]:
    """The tensors of a state before the first token."""
    return {
        name: torch.full(shape, EMPTY.get(name, 0), dtype=of, device=device) for name, (shape, of) in layout.items()
    }


def emptied(state: "State", slots: Tensor) -> dict[str, Any]:
    """The tensors with one entry per slot, with these slots [B, Hkv, C] bool made empty, by name."""
    return without_keys(slot_tensors(state), slots)


def without_keys(tensors: Mapping[str, Tensor], slots: Tensor) -> dict[str, Any]:
    """Tensors [B, Hkv, C, ...] with one entry per slot, by name, with these slots [B, Hkv, C] bool made empty."""
    return {
        name: tensor.masked_fill(slots if tensor.dim() == 3 else slots[..., None], EMPTY.get(name, 0))
        for name, tensor in tensors.items()
    }


def first_places(chosen: Tensor, slots: int) -> Tensor:
    """[B, Hkv, slots] int64: the places of the chosen of [B, Hkv, M], in order; -1 after them.  O(M) time."""
    places = torch.arange(chosen.shape[-1], device=chosen.device).expand(chosen.shape)
    # A cell beyond the slots collects the places that are not chosen.
    slot = torch.where(chosen, chosen.cumsum(-1) - 1, slots).clamp(max=slots)
    found = torch.full((*chosen.shape[:-1], slots + 1), -1, device=chosen.device)
    return found.scatter(-1, slot, places)[..., :slots]


def keys_at(place: Tensor, keys: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tensors of slots with the keys at these places [B, Hkv, C] of [B, Hkv, M, ...]; -1 = an empty slot."""
    slot = place.clamp(min=0)
    return without_keys({name: along_keys(tensor, slot) for name, tensor in keys.items()}, place < 0)


def refuse_sizes(
    batch_size: int, num_kv_heads: int, head_dim: int, value_dim: int, dtype: torch.dtype, gate_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> None:  # fmt: skip
    """Raise ValueError or TypeError for sizes and dtypes that no state has."""
    checks.positive_int("batch_size", batch_size, 0)
    for name, size in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim), ("value_dim", value_dim)):
        checks.positive_int(name, size)
    if gate_dtype not in (torch.float32, torch.float64):
        raise TypeError(f"gate_dtype: expected torch.float32 or torch.float64, got {gate_dtype}")
    if bias_dtype not in (None, torch.float32, torch.float64):
        raise TypeError(f"bias_dtype: expected torch.float32, torch.float64 or None, got {bias_dtype}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating point torch.dtype, got {dtype!r}")


def refuse_difference(
    name: str,
    state: "State",
    layout: StateLayout,
    options: dict[str, Any],
    device: torch.device,
    *,
    batch: bool = True,
) -> None:
    """Raise unless `state` has this layout, these options and this device.  batch: also compare the batch size."""
    for option, want in options.items():
        if getattr(state, option) != want:
            raise ValueError(
                f"{name}: expected {option}={want!r}, got a state with {option}={getattr(state, option)!r}"
            )
    if (state.bias is not None) != ("bias" in layout):
        want, have = ("a", "one without") if "bias" in layout else ("no", "one with a")
        raise ValueError(f"{name}: expected a state with {want} bias, got {have} bias")
    for field, (shape, dtype) in layout.items():
        have = getattr(state, field)
        if have.dim() != len(shape):
            raise ValueError(f"{name}: expected {field} {['B', *shape[1:]]}, got {list(have.shape)}")
        if have.device != device:
            raise ValueError(f"{name}: expected a state on {device}, got one on {have.device}")
        if have.dtype != dtype:
            is_cast = field in ("gate", "bias", "forgotten") and have.dtype not in (torch.float32, torch.float64)
            hint = "; if fully_shard cast the state, pass cast_forward_inputs=False in its MixedPrecisionPolicy"
            raise TypeError(f"{name}: expected {field} of {dtype}, got {have.dtype}{hint if is_cast else ''}")
        if tuple(have.shape[1:]) != tuple(shape[1:]):
            raise ValueError(f"{name}: expected {field} {['B', *shape[1:]]}, got {list(have.shape)}")
        if batch and have.shape[0] != shape[0]:
            raise ValueError(f"{name}: expected batch size {shape[0]}, got {have.shape[0]}")
