"""Several intervals per key as terms: one interval per term, and P terms per key.

    term t = j P + p   is interval p of key j        so the key of a term is t // P, and the terms of a key are neighbours

Each term is one term of the softmax, with its own bias.  Lowerings order, pack and gather terms as they do keys, and read
key and value at t // P; no copy of a key exists.  Births and deaths move by (P - 1) K: as with P = 1, the queries are the
last Q positions of the row.
"""

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

from flexdma.lifespans.interval import Lifespans


def as_terms(intervals: Sequence[tuple[Tensor, Tensor]], keys: int) -> Lifespans:
    """P intervals of K keys, each [B, 1 or Hkv, K] of any integers, as the lifespans of P K terms.

        intervals = birth [0 1 2], death [2 3 3] and birth [2 3 3], death [3 3 3]: P = 2, K = 3
        birth = [3 5 | 4 6 | 5 6], death = [5 6 | 6 6 | 6 6]        queries 0 to 2 are positions 3 to 5

    Returns birth and death [B, H, P K] int32, contiguous, clamped to the positions of the keys.
    """
    bounds = [[bound.clamp(0, keys).to(torch.int32) for bound in each] for each in intervals]
    if len(intervals) == 1:
        return Lifespans(*(bound.contiguous() for bound in bounds[0]))
    after = (len(intervals) - 1) * keys
    return Lifespans(*(_interleaved(side) + after for side in zip(*bounds, strict=True)))


def bias_of_terms(biases: Sequence[Tensor | None]) -> Tensor | None:
    """Biases of the intervals, [B, 1 or Hkv, K], as those of the terms, [B, H, P K]; None where no interval has one.

    float64 where one of them is, else float32 where there are several.  An interval without a bias gets 0.
    """
    given = [bias for bias in biases if bias is not None]
    if not given or len(biases) == 1:
        return biases[0]
    dtype = torch.float64 if any(bias.dtype == torch.float64 for bias in given) else torch.float32
    zero = torch.zeros_like(given[0], dtype=dtype)
    return _interleaved([zero if bias is None else bias.to(dtype) for bias in biases])


def as_intervals(terms: Lifespans, bias: Tensor | None, key: Tensor) -> tuple[list[Lifespans], list[Tensor | None]]:
    """The inverse of `as_terms` and `bias_of_terms`: P lifespans and P biases for key [B, Hkv, K, D]."""
    each = terms_per_key(terms.birth, key)
    after = (each - 1) * key.shape[2]
    lifespans = [Lifespans(*(bound[..., p::each] - after for bound in terms)) for p in range(each)]
    return lifespans, [None if bias is None else bias[..., p::each] for p in range(each)]


def terms_per_key(terms: Tensor, key: Tensor) -> int:
    """P, for a tensor [B, H, P K] of terms and key [B, Hkv, K, ...]."""
    return index(terms.shape[-1] // key.shape[2])


def _interleaved(tensors: Sequence[Tensor]) -> Tensor:
    """[B, 1 or H, K] each -> [B, H, P K]."""
    return torch.stack(torch.broadcast_tensors(*tensors), -1).flatten(-2)
