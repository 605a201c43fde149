"""Mixed precision: `torch.autocast` applies to attention as it does to `scaled_dot_product_attention`."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Query, key and value in autocast's dtype; unchanged outside of autocast, or where one of them is float64.

    A rotary embedding or a norm may return a float32 query beside a bfloat16 value; this casts both.  Keys that a state
    keeps then have the dtype of attention.  Gates are not cast: they are ranked in float32 or float64.
    """
    if not all(isinstance(tensor, Tensor) and tensor.is_floating_point() for tensor in tensors):
        return tensors  # the argument checks refuse them by name
    kind = tensors[0].device.type
    if not is_autocast(kind):
        return tensors
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context that disables autocast; an empty one where it is not enabled, or the device has none, such as meta."""
    return torch.autocast(device.type, enabled=False) if is_autocast(device.type) else nullcontext()


def is_autocast(kind: str) -> bool:
    """Whether autocast is enabled for devices of this type."""
    return (kind == "cpu" or _has_autocast(kind)) and torch.is_autocast_enabled(kind)


@torch.compiler.assume_constant_result  # Dynamo of torch 2.11 cannot trace this call
def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)
