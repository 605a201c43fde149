"""Order statistics of intervals: the k-th smallest of values[left:right], for every element at once.

A wavelet matrix (Claude, Navarro and Ordóñez, "The wavelet matrix", 2015), queried level by level while it is built, so
only one level is in memory.  O(N log N) time, O(N) memory, no loop over positions, no host synchronisation.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexdma.rounding import levels

# Three counters of 21 bits fit in an int64.
DIGITS, FIELD = 4, 21
MASK = 2**FIELD - 1


def kth_smallest(values: Tensor, left: Tensor, right: Tensor, k: Tensor) -> Tensor:
    """For every element n, the k[n]-th smallest (0 = the smallest) of values[left[n]:right[n]].

    values: [..., N] int32, each row a permutation of 0 .. N-1.
    left, right, k: [..., N] int64, 0 <= left <= right <= N.
    Returns [..., N] int64; an arbitrary number where k[n] >= right[n] - left[n].

        values = [2 0 3 1], left = 0, right = 4, k = 2      the third smallest of all four: 2
    """
    by_digit = levels(values.shape[-1] + 1) <= FIELD
    return (kth_smallest_by_digit if by_digit else kth_smallest_by_bit)(values, left, right, k)


def kth_smallest_by_bit(values: Tensor, left: Tensor, right: Tensor, k: Tensor) -> Tensor:
    """`kth_smallest` for any N in ceil(log2 N) rounds of one cumulative sum, three gathers and one scatter.

    The plain form, with which tests compare the others.
    """
    length = values.shape[-1]
    positions = torch.arange(length, device=values.device)
    result = torch.zeros_like(k)
    for level in reversed(range(levels(length))):
        bit = 1 << level
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
        values = scattered(values, torch.where(is_zero, before, total + positions - before))
    return result


def kth_smallest_by_digit(values: Tensor, left: Tensor, right: Tensor, k: Tensor) -> Tensor:
    """`kth_smallest` for N < 2^21 in ceil(log4 N) rounds: four digits, counted in one cumulative sum.

    For devices that compile it: ranking and lifespans take 13 launches instead of 37 (docs/kernels.md).  There are half
    as many rounds; each moves 55 bytes per key instead of 48 (`flexdma/tools/cost_model/kernel_bytes.py`).
    """
    length = values.shape[-1]
    positions = torch.arange(length, device=values.device)
    result = torch.zeros_like(k)
    ones = sum(1 << (FIELD * d) for d in range(DIGITS - 1))
    for shift in reversed(range(0, levels(length), 2)):
        digit = (values.long() >> shift) & (DIGITS - 1)
        # Field d counts the elements whose digit is at most d.  The last digit needs no field: it counts all elements.
        steps = torch.where(digit == DIGITS - 1, 0, ones << (digit * FIELD)) & (2**63 - 1)
        counters = pad(steps.cumsum(-1), (1, 0))  # [..., N + 1]
        before, total = counters[..., :-1], counters[..., -1:]
        at_left, at_right = counters.gather(-1, left), counters.gather(-1, right)
        inside = at_right - at_left  # no field borrows: counters never decrease
        chosen = torch.zeros_like(k)
        for d in range(DIGITS - 1):
            chosen = chosen + (k >= _field(inside, d)).long()
        k = k - _below(inside, chosen)
        start = _below(total, chosen)
        left = start + _up_to(at_left, chosen, left) - _below(at_left, chosen)
        right = start + _up_to(at_right, chosen, right) - _below(at_right, chosen)
        result = result + (chosen << shift)
        values = scattered(values, _below(total, digit) + _up_to(before, digit, positions) - _below(before, digit))
    return result


def _field(counters: Tensor, digit: Tensor | int) -> Tensor:
    return (counters >> (digit * FIELD)) & MASK


def _up_to(counters: Tensor, digit: Tensor, index: Tensor) -> Tensor:
    """How many of the first `index` elements have a digit of at most `digit`."""
    return torch.where(digit == DIGITS - 1, index, _field(counters, digit.clamp(max=DIGITS - 2)))


def _below(counters: Tensor, digit: Tensor) -> Tensor:
    """How many of the counted elements have a digit below `digit`."""
    return torch.where(digit == 0, 0, _field(counters, (digit - 1).clamp(min=0)))


def scattered(values: Tensor, place: Tensor) -> Tensor:
    """[..., N] int32 -> the same with values[..., n] at place[..., n]; `place` is a permutation of each row."""
    # int32: Inductor generates no int64 scatter, and would call ATen's.
    if values.device.type == "cpu":
        # In place is safe: this runs inside opaque operators, whose temporaries autograd and checkpoint policies do not see.
        return torch.empty_like(values).scatter_(-1, place, values)
    # For scatter Inductor first fills the output, in a launch of its own; for index_put into an empty tensor it does not.
    length = values.shape[-1]
    row = torch.arange(values.numel() // length, device=values.device).view(*values.shape[:-1], 1)
    empty = torch.empty(values.numel(), dtype=values.dtype, device=values.device)
    return empty.index_put(((place + row * length).flatten(),), values.flatten()).view(values.shape)
