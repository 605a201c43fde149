"""Divide a number of keys over heads, to those whose outputs change least for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def divided(total: int, sizes: Sequence[int], errors: Tensor, highest: Tensor) -> Tensor:
    """Windows [heads] int64 with the sum `total` and small errors, each at least sizes[0].

    sizes: [S], ascending.  errors: [S, heads], of a head whose window has such a size.
    highest: [heads] int64, of each window, at least sizes[0].

    Greedy: the next keys go where the error falls most per key.  This is the least sum of errors where they are taken as
    linear between the sizes on their lower convex hull.  What is left when no error falls is spread evenly.
    The sum is another one only where the bounds leave no choice.  O(heads S (S + log heads)).
    """
    windows = torch.full_like(highest, sizes[0])
    left = total - int(windows.sum())
    steps = []
    for head, bound in enumerate(highest.tolist()):
        steps += [(*step, head) for step in _steps([size for size in sizes if size <= bound], errors[:, head].tolist())]
    # Steps of one head are in order, because a hull flattens and sorting is stable.
    for _, keys, head in sorted(steps, key=lambda step: -step[0]):
        given = min(keys, max(left, 0))
        windows[head] += given
        left -= given
    while left > 0 and bool((windows < highest).any()):
        room = (windows < highest).nonzero()[:left, 0]
        more = (highest[room] - windows[room]).clamp(max=max(1, left // len(room)))
        windows[room] += more
        left -= int(more.sum())
    return windows


def _steps(sizes: list[int], errors: list[float]) -> list[tuple[float, int]]:
    """(fall of the error per key, keys) of each edge of the lower convex hull on which the error falls."""
    steps, now = [], 0
    while now + 1 < len(sizes):
        gains = [(errors[now] - errors[other]) / (sizes[other] - sizes[now]) for other in range(now + 1, len(sizes))]
        gain = max(gains)
        if gain <= 0:
            break
        # The farthest of equal ones, so that an edge is one step.
        other = now + len(gains) - gains[::-1].index(gain)
        steps.append((gain, sizes[other] - sizes[now]))
        now = other
    return steps
