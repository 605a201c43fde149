"""Donated states: the caller gives up a state, and decoding overwrites its slots instead of copying them."""

import torch
from torch import Tensor

from flexdma.state.layout import slot_tensors
from flexdma.state.value import State
from flexdma.transforms import is_exporting, is_transformed, needs_gradient


def check_donation(donate: bool, state: State | None, return_state: bool, *tensors: Tensor | None) -> None:
    """Raise TypeError where `donate` is no bool, and ValueError where it is True and the state cannot be overwritten.

    tensors: the other tensors of the call.
    """
    if not isinstance(donate, bool):
        raise TypeError(f"donate: expected a bool, got {donate!r}")
    if not donate:
        return
    if state is None or not return_state:
        raise ValueError("donate: expected False unless a state is given and returned, got True")
    if (why := _obstacle(state, tensors)) is not None:
        raise ValueError(f"donate: expected False {why}, got True")


def can_donate(state: State, *tensors: Tensor | None) -> bool:
    """Whether a call with these tensors may overwrite the slots of the state."""
    return _obstacle(state, tensors) is None


def _obstacle(state: State, tensors: tuple[Tensor | None, ...]) -> str | None:
    if is_exporting():
        return "in torch.export, as a program returns new tensors"
    if is_transformed():
        return "inside torch.func and forward-mode AD, which may need the old state"
    slots = slot_tensors(state)
    if any(tensor.requires_grad for tensor in slots.values()) or needs_gradient(*tensors):
        return (
            "with tensors that need a gradient, as a backward needs the old state; detach them or use torch.no_grad()"
        )
    writes_any = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
    for name, tensor in slots.items():
        if not writes_any and tensor.is_inference():
            return (
                "outside torch.inference_mode for a state that was made in it, as torch forbids writes to its tensors"
            )
        if not tensor.is_contiguous():
            return f"for a state whose {name} is not contiguous"
    return None
