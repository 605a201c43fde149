"""A prefix scan over the ranks of a mesh: what an associative operation makes of the tensors of all earlier ranks.

In round k each rank sends the result of its last 2^k ranks, its own included, to the rank 2^k after it (Hillis and Steele,
"Data Parallel Algorithms", 1986).  So ceil(log2 P) rounds reach P ranks, and a rank receives that many messages at most.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flexdma.distributed.shift import shifted

Tensors = tuple[Tensor, ...]


def of_earlier_ranks(
    own: Tensors, none: Tensors, join: Callable[[Tensors, Tensors], Tensors], mesh: DeviceMesh
) -> Tensors:
    """join(tensors of rank 0, join(tensors of rank 1, ...)) up to the rank before this one; `none` on rank 0.

    own, none, and results of `join`: tensors of equal shapes and dtypes on all ranks.  join: associative.
    Differentiable; see `shifted`.
    """
    rank, size = mesh.get_local_rank(), mesh.size()
    before, through, distance = none, own, 1
    while distance < size:
        received = shifted(through, distance, mesh)
        if rank < distance:
            # `where` and not `none` alone: the results then need the backward of `shifted` on all ranks.
            nothing = torch.zeros((), dtype=torch.bool, device=own[0].device)
            received = tuple(torch.where(nothing, zero, empty) for zero, empty in zip(received, none, strict=True))
        before = received if distance == 1 else join(received, before)
        distance *= 2
        if distance < size:
            through = join(received, through)
    return before


def sum_of_earlier_ranks(number: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of this tensor over all earlier ranks; zeros on rank 0.  Differentiable; see `shifted`."""
    (total,) = of_earlier_ranks((number,), (torch.zeros_like(number),), lambda a, b: (a[0] + b[0],), mesh)
    return total
