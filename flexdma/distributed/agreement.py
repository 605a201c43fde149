"""The check that all ranks of a mesh call with the same options, shapes and dtypes.

Messages of different sizes end in wrong numbers or in a wait for the timeout, and no error of a process group names the
argument.  So each call first compares one number per option, in one all-reduce of a few bytes.
"""

import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from flexdma.transforms import can_read

# Calls whose comparison this process has read.  Reading waits for the device, so each call is read once there.
_read: set[tuple[str, str, tuple[int, ...]]] = set()


def same_on_all_ranks(
    tensor: Tensor, options: Mapping[str, object], sizes: Mapping[str, int], mesh: DeviceMesh
) -> Tensor:
    """Raise ValueError naming the first option or size that is not the same on all ranks; returns the tensor.

    Use the returned tensor in the collectives that follow, so that a compiler keeps their order.
    On a CPU every call is compared.  On other devices the first call with these options is; later ones send the same numbers
    and read nothing.  A rank that changes an option later raises there, and the others end after the timeout.
    """
    # Text, because an operator takes no lists of names.  Sizes stay numbers, which may be symbolic.
    text = "\n".join([*sizes, *(f"{name}={value!r}" for name, value in options.items())])
    arguments = text, list(sizes.values()), mesh.get_group().group_name
    if can_read(tensor):
        _compare(tensor, *arguments)
        return tensor
    return _compared(tensor, *arguments)


# CUDA graphs leave it out, because it reads the device and keeps a tensor.
@torch.library.custom_op("flexdma::same_on_all_ranks", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _compared(tensor: Tensor, options: str, sizes: list[int], group: str) -> Tensor:
    _compare(tensor, options, sizes, group)
    return tensor.clone()


_compared.register_fake(lambda tensor, options, sizes, group: torch.empty_like(tensor))
_compared.register_autograd(lambda ctx, gradient: (gradient, None, None, None))


def _compare(tensor: Tensor, options: str, sizes: list[int], group: str) -> None:
    pairs = [line.split("=", 1) for line in options.splitlines()]
    names = [pair[0] for pair in pairs]
    values = [*map(str, sizes), *(pair[1] for pair in pairs[len(sizes) :])]
    numbers = tuple(map(_number, values))
    both = collectives.all_reduce(_both_ends(numbers, tensor.device), "max", cast(Any, group))
    both = collectives.wait_tensor(both)
    call = group, options, tuple(sizes)
    if tensor.device.type != "cpu" and call in _read:
        return
    ends = both.tolist()
    for index, (name, value) in enumerate(zip(names, values, strict=True)):
        largest, least = ends[index], -ends[index + len(names)]
        if largest != least:
            others = f"{least} to {largest} on all ranks" if least >= 0 else "another value on some rank"
            raise ValueError(f"{name}: expected the same on every rank of the mesh, got {value} on this rank, {others}")
    if tensor.device.type != "cpu":
        _read.add(call)


@lru_cache(maxsize=256)
def _both_ends(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """The numbers and their negatives, whose largest over ranks are both ends.  Kept: a copy to a device takes time."""
    return torch.tensor([*numbers, *(-number for number in numbers)], device=device)


def _number(value: str) -> int:
    """A whole number as itself, any other text as a negative checksum."""
    return int(value) if value.isdigit() else -1 - zlib.crc32(value.encode())


def refuse_other_mesh(mesh: object, **tensors: Tensor) -> None:
    """Raise unless `mesh` has one dimension, this rank, and the device type of the tensors, which are no DTensors."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh: expected a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, as mesh['cp'] has, got {mesh.ndim}")
    if mesh.get_coordinate() is None:
        raise ValueError("mesh: expected this rank in the mesh, got a mesh of other ranks")
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            raise TypeError(f"{name}: expected the part of this rank, as from to_local(), got a DTensor")
        if mesh.device_type != tensor.device.type:
            raise ValueError(f"mesh: expected a mesh of {tensor.device.type} devices, got one of {mesh.device_type}")
