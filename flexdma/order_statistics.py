"""Order statistics on prefixes: the k-th smallest of values[left:right], for every element at once.

A wavelet matrix (Claude, Navarro and Ordóñez, "The wavelet matrix", 2015) answered level by level while it is built, so
that nothing is stored: ceil(log2 N) rounds, each one cumulative sum, three gathers and one scatter.  O(N log N) time,
O(N) memory, no loop over positions, no host synchronisation.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def kth_smallest(values: Tensor, left: Tensor, right: Tensor, k: Tensor) -> Tensor:
    """For every element n, the k[n]-th smallest (0 = the smallest) of values[left[n]:right[n]].

    values: [..., N] int64, each row a permutation of 0 .. N-1.
    left, right, k: [..., N] int64, 0 <= left <= right <= N.
    Returns [..., N] int64; meaningless where k[n] >= right[n] - left[n], never out of the range of int64.

        values = [2 0 3 1], left = 0, right = 4, k = 2      the third smallest of all four: 2
    """
    length = values.shape[-1]
    positions = torch.arange(length, device=values.device)
    # int32: Inductor writes no int64 scatter of its own, and would call ATen's in every round, after a fill.
    values = values.to(torch.int32)
    result = torch.zeros_like(k)
    bit = 1
    # Written as a comparison, not as bit_length(): a symbolic length is then guarded per power of two, not per length.
    while bit < length:
        bit *= 2
    while bit > 1:
        bit //= 2
        is_zero = (values & bit) == 0
        zeros_before = pad(is_zero.cumsum(-1), (1, 0))  # [..., N + 1]
        total = zeros_before[..., -1:]
        left_zeros, right_zeros = zeros_before.gather(-1, left), zeros_before.gather(-1, right)
        zeros = right_zeros - left_zeros
        smaller = k < zeros
        left = torch.where(smaller, left_zeros, total + left - left_zeros)
        right = torch.where(smaller, right_zeros, total + right - right_zeros)
        result = result + torch.where(smaller, 0, bit)
        k = torch.where(smaller, k, k - zeros)
        before = zeros_before[..., :-1]
        destination = torch.where(is_zero, before, total + positions - before)
        values = torch.empty_like(values).scatter_(-1, destination, values)
    return result
