"""What queries see under given lifespans: the largest number of keys, and the best key.

These functions take any lifespans: births before or after a key's own position, empty ones, keys in any order.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexdma.compiled import compiled_on_gpu
from flexdma.lifespans.interval import Lifespans
from flexdma.lifespans.order_statistics import scattered
from flexdma.lifespans.ranking import by_rank
from flexdma.opaque import opaque_on_cpu
from flexdma.rounding import levels

# The rank of a key that is not seen; a constant, because torch.export fixes a length that fills a tensor.
NO_RANK = 2**31 - 1


def causal_lifespans(keys: Tensor) -> Lifespans:
    """Plain causal attention, [B, 1, K]: each of the keys [B, H, K, ...] lives from its own position to the end."""
    batch, length = keys.shape[0], keys.shape[2]
    birth = torch.arange(length, dtype=torch.int32, device=keys.device).expand(batch, 1, -1)
    return Lifespans(birth.contiguous(), torch.full_like(birth, length))


def seen_by_queries(lifespans: Lifespans, queries: int) -> Lifespans:
    """The lifespans as indices of the last `queries` positions: 0 = the first of them, 0 <= birth, death <= queries."""
    first_query = lifespans.birth.shape[-1] - queries
    return Lifespans(*((bound - first_query).clamp(0, queries) for bound in lifespans))


def without_unseen(lifespans: Lifespans, queries: int) -> Lifespans:
    """The lifespans with death 0 for keys that none of the last `queries` positions sees.

    Such keys take no slot, and their contents reach no query.
    """
    birth, death = lifespans
    unseen = death <= birth.clamp(min=birth.shape[-1] - queries)
    return Lifespans(birth, death.masked_fill(unseen, 0))


def without_hidden(lifespans: Lifespans, bias: Tensor) -> Lifespans:
    """The lifespans, empty for keys with a bias [B, H, K] of -inf."""
    birth, death, bias = torch.broadcast_tensors(*lifespans, bias)
    return Lifespans(birth, torch.where(bias == float("-inf"), birth, death))


def births_are_positions(lifespans: Lifespans) -> bool:
    """Whether each key that is ever visible is born at its own position.  Reads the device."""
    return bool(_births_are_positions(*lifespans))


@compiled_on_gpu
def _births_are_positions(birth: Tensor, death: Tensor) -> Tensor:
    position = torch.arange(birth.shape[-1], device=birth.device)
    return ((birth == position) | (death <= birth)).all()


def most_visible(lifespans: Lifespans, queries: int) -> int:
    """The largest number of keys that one of the last `queries` positions sees.  Reads the device; O(K)."""
    return int(_most_visible(*lifespans, queries)) if lifespans.birth.numel() else 0


@compiled_on_gpu
def _most_visible(birth: Tensor, death: Tensor, queries: int) -> Tensor:
    born, dies = (bound.long() for bound in seen_by_queries(Lifespans(birth, death), queries))
    one = (dies > born).int()
    steps = torch.zeros((*born.shape[:-1], queries + 1), dtype=torch.int32, device=born.device)
    steps = steps.scatter_add(-1, born, one).scatter_add(-1, dies, -one)
    return steps.cumsum(-1).max()


def _empty_best(bias: Tensor, birth: Tensor, death: Tensor, queries: int) -> list[Tensor]:
    return [torch.empty((*bias.shape[:-1], queries), dtype=torch.int64, device=bias.device)]


@opaque_on_cpu("best_visible", _empty_best)
def best_visible(bias: Tensor, birth: Tensor, death: Tensor, queries: int) -> list[Tensor]:
    """[B, H, Q] int64, in a list: the key of the largest finite bias that each of the last Q positions sees; -1 for none.

    bias, birth, death: [B, H, K].  Of equal biases the key of the larger index.

    An interval is the union of two intervals of length 2^level, which may overlap.  Going down from the largest level, each
    interval passes its best key on to its halves: ceil(log2 Q) + 1 rounds of two scatters and one minimum.
    O(K log Q + K log K) time.
    """
    keys = bias.shape[-1]
    born, dies = (bound.long() for bound in seen_by_queries(Lifespans(birth, death), queries))
    size = dies - born
    seen = (size > 0) & bias.isfinite()
    ranked = by_rank(torch.where(seen, bias, float("-inf")))
    rank = scattered(torch.arange(keys, dtype=torch.int32, device=bias.device).expand_as(ranked), ranked)
    rank = torch.where(seen, rank, NO_RANK)
    best = torch.full((*bias.shape[:-1], queries), NO_RANK, dtype=torch.int32, device=bias.device)
    for level in reversed(range(levels(queries) + 1)):
        length = 1 << level
        # Before this line best[i] belongs to queries i .. i + 2 length - 1, after it to i .. i + length - 1.
        best = torch.minimum(best, pad(best, (length, 0), value=NO_RANK)[..., :queries])
        here = torch.where((size >= length) & (size < 2 * length), rank, NO_RANK)
        for start in (born.clamp(max=queries - 1), (dies - length).clamp(min=0)):
            best = best.scatter_reduce(-1, start, here, "amin")
    return [torch.where(best < NO_RANK, ranked.gather(-1, best.clamp(max=keys - 1).long()), -1)]
