"""Divide a number of keys over heads."""

import torch
from torch import Tensor


def divided(total: int, shares: Tensor, lowest: int, highest: Tensor) -> Tensor:
    """Whole numbers [heads] that are proportional to `shares`, within bounds, and have the sum `total`.

    shares: [heads], any numbers >= 0.  lowest: of each number.  highest: [heads] int64, of each number.
    The sum is another one only where the bounds leave no choice.
    """
    bound = highest.double()
    sizes = shares.double().clamp(min=torch.finfo(torch.float32).tiny)
    low, high = 0.0, float(total) / float(sizes.min()) + float(bound.max()) / float(sizes.min())
    # The sum grows with the factor, so bisection finds it.
    for _ in range(200):
        factor = (low + high) / 2
        given = (sizes * factor).clamp(min=lowest).minimum(bound)
        low, high = (low, factor) if given.sum() > total else (factor, high)
    exact = (sizes * low).clamp(min=lowest).minimum(bound)
    whole = exact.floor().long()
    # The largest remainders get the keys that rounding down has left.
    for head in (exact - whole).argsort(descending=True, stable=True).tolist():
        if whole.sum() >= total:
            break
        if whole[head] < highest[head]:
            whole[head] += 1
    return whole
