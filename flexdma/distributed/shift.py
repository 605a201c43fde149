"""Tensors that every rank sends to the rank a fixed distance after it.

One message per call, by an all-to-all in which all parts but one are empty: NCCL runs it as one send and one receive, and it
is traceable where point-to-point calls are not.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def shifted(tensors: Sequence[Tensor], distance: int, mesh: DeviceMesh) -> tuple[Tensor, ...]:
    """The tensors of the rank `distance` before this one in a mesh of one dimension; zeros where there is none.

    tensors: of shapes and dtypes that are equal on all ranks.  distance: may be negative.
    Differentiable, any number of times: the backward sends the gradients of what was received back, in float32 where dtypes
    have 16 bits, because the owner adds gradients of several ranks.  All ranks must call it, and its backward, in the same
    order.
    """
    return _Shift.apply(distance, mesh.get_local_rank(), mesh.size(), mesh.get_group().group_name, *tensors)


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, distance: int, rank: int, size: int, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.place = distance, rank, size, group
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        received = _exchanged(tensors, distance, rank, size, group)
        ctx.mark_non_differentiable(*(tensor for tensor in received if not tensor.is_floating_point()))
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        distance, rank, size, group = ctx.place
        wide = [
            gradient.to(torch.promote_types(dtype, torch.float32))
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
            if dtype.is_floating_point
        ]
        returned = iter(_Shift.apply(-distance, rank, size, group, *wide))
        return (
            None, None, None, None,
            *(next(returned).to(dtype) if dtype.is_floating_point else None for dtype in ctx.dtypes),
        )  # fmt: skip


def _exchanged(tensors: Sequence[Tensor], distance: int, rank: int, size: int, group: Any) -> tuple[Tensor, ...]:
    """`shifted` without gradients."""
    # Large elements first, so that each tensor starts at a multiple of its element size.
    order = sorted(range(len(tensors)), key=lambda index: -tensors[index].element_size())
    message = torch.cat([tensors[index].contiguous().view(-1).view(torch.uint8) for index in order])
    to, source = rank + distance, rank - distance
    sent, received = [0] * size, [0] * size
    if 0 <= to < size:
        sent[to] = message.shape[0]
    if 0 <= source < size:
        received[source] = message.shape[0]
    arrived = collectives.all_to_all_single(message if any(sent) else message[:0], received, sent, group)
    arrived = collectives.wait_tensor(arrived)
    if not any(received):
        return tuple(torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)
    parts: dict[int, Tensor] = {}
    for index, part in zip(order, arrived.split([tensors[index].nbytes for index in order]), strict=True):
        parts[index] = part.view(tensors[index].dtype).view(tensors[index].shape)
    return tuple(parts[index] for index in range(len(tensors)))
