"""Binary search in rows, and a sort of rows of small numbers."""

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from flexdma.opaque import is_fused


def count_up_to(ascending: Tensor, bound: Tensor) -> Tensor:
    """How many numbers of each row are at most the bound.

    ascending: [..., n], n >= 1, ascending along the last dimension; bound: [..., m], which may broadcast.
    Returns [..., m] int64.  O(m log n) time for each row.
    """
    # No result changes where the bound is above the last number.  With this minimum each bound depends on its row:
    # Inductor's Triton search fails to compile where bounds are the same in all rows of a block (torch 2.11 to 2.14).
    return torch.searchsorted(ascending, torch.minimum(bound, ascending[..., -1:]), right=True)


def sorted_rows(numbers: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """A stable sort of each row: the numbers in ascending order, and their indices, int64.

    numbers: [..., n] int32, from 0 to end - 1.
    """
    rows, length = numbers.shape[:-1].numel(), numbers.shape[-1]
    largest = rows * max(end, length) if has_static_value(end) and has_static_value(rows * length) else 2**31
    if not is_fused(numbers) or largest >= 2**31:
        ascending, order = numbers.sort(dim=-1, stable=True)
        return ascending, order
    # All rows in one: on a GPU ATen sorts several rows by their numbers, then by their rows, with tensors of both between.
    row = torch.arange(rows, dtype=torch.int32, device=numbers.device).view(*numbers.shape[:-1], 1)
    ascending, order = (numbers + row * end).flatten().sort(stable=True)
    return ascending.view(numbers.shape) - row * end, order.view(numbers.shape) - row * length
