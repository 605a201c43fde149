"""The k-th smallest of a prefix of a permutation, for every element at once, in operations that are fast on a CPU.

A wavelet tree (Grossi, Gupta and Vitter, 2003), queried level by level while it is built.  The values are a permutation, so
the node of values n 2^s .. (n + 1) 2^s - 1 occupies exactly these places, and every node before it has as many ones as
zeros in its next bit.  One gather per level then finds the count for which `order_statistics.kth_smallest` needs two.
Integer arithmetic in place chooses between the branches, because PyTorch vectorises it and does not vectorise `where`.
ceil(log2 N) levels of one cumulative sum, one gather and one scatter.  O(N log N) time, O(N) memory.

On a CPU it takes 0.32 to 0.42 of the time of `kth_smallest_by_bit` (8 rows of 4,096 to 131,072; 2 cores, torch 2.13), and
`kth_smallest_by_digit` 1.5 to 1.9 times as long.
"""

import torch
from torch import Tensor

from flexdma.rounding import levels
from flexdma.transforms import is_exporting


def kth_smallest_of_prefix(values: Tensor, right: Tensor, k: Tensor) -> Tensor:
    """For every element n, the k[n]-th smallest (0 = the smallest) of values[:right[n]].

    values: [..., N] integers, each row a permutation of 0 .. N-1.
    right, k: [..., N] integers, 0 <= right <= N, 0 <= k < 2^31 - 1.
    Returns [..., N] int32; an arbitrary number where k[n] >= right[n].

        values = [2 0 3 1], right = 3, k = 1      the second smallest of 2 0 3: 2
    """
    length = values.shape[-1]
    places = torch.arange(length, dtype=torch.int32, device=values.device)
    values, inside = values.to(torch.int32), right.to(torch.int32)
    kth = k.to(torch.int32) + 1  # counted from 1: reached <=> kth <= count
    node = torch.zeros_like(values)  # first value, and also first place, of the node that contains the result
    ones_before = values.new_zeros(*values.shape[:-1], length + 1)
    for shift in reversed(range(levels(length))):
        bits = (values >> shift).bitwise_and_(1)
        # Clamped: where k >= right the place may lie beyond the end.
        end = (node + inside).clamp_(max=length).long()
        if is_exporting():
            # Without a zero in front: Inductor repeats the code of a padded tensor for each of its readers.
            counted = bits.cumsum(-1, dtype=torch.int32)
            before, at_end = counted - bits, torch.where(end > 0, counted.gather(-1, (end - 1).clamp(min=0)), 0)
        else:
            torch.cumsum(bits, -1, dtype=torch.int32, out=ones_before[..., 1:])
            before, at_end = ones_before[..., :-1], ones_before.gather(-1, end)
        ones = at_end.sub_(node >> 1)  # among the first `inside` places of the node
        zeros = inside - ones
        goes_right = (zeros - kth) >> 31  # all bits set where kth > zeros, else none
        kth.sub_(zeros & goes_right)
        inside = ones.sub_(zeros).bitwise_and_(goes_right).add_(zeros)
        node.sub_(goes_right, alpha=1 << shift)
        if shift:
            # A stable partition of every node: zeros to  place - (before - half),  ones to  half + 2^shift + before.
            half = (places >> (shift + 1)) << shift  # half the node's first place = the ones in all nodes before it
            place = torch.sub(before, places - (1 << shift)).add_(before).mul_(bits).sub_(before).add_(places + half)
            values = torch.empty_like(values).scatter_(-1, place.long(), values)
    return node
