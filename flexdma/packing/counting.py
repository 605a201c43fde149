"""Binary search in rows."""

import torch
from torch import Tensor


def count_up_to(ascending: Tensor, bound: Tensor) -> Tensor:
    """How many numbers of each row are at most the bound.

    ascending: [..., n], n >= 1, ascending along the last dimension; bound: [..., m], which may broadcast.
    Returns [..., m] int64.  O(m log n) time for each row.
    """
    # No result changes where the bound is above the last number.  With this minimum each bound depends on its row:
    # Inductor's Triton search fails to compile where bounds are the same in all rows of a block (torch 2.11 to 2.14).
    return torch.searchsorted(ascending, torch.minimum(bound, ascending[..., -1:]), right=True)
