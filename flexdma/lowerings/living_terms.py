"""The living keys of each block of queries where births may come at any query, and where keys have several intervals.

One sweep over the blocks per head: the terms that are still alive, and those born in the block.  The lists have any length,
so eager only, and need no capacity.  A sort of the terms by birth, then O(visible terms + births) per block.
"""

import torch
from torch import Tensor

from flexdma.lifespans import Lifespans
from flexdma.lifespans.visible import seen_by_queries
from flexdma.lowerings.living_keys import LivingList
from flexdma.stages import staged


@staged("living keys")
def living_terms(lifespans: Lifespans, queries: int, block: int) -> list[list[LivingList]]:
    """For each of B H heads, for each of its R blocks of queries, the living terms.

    lifespans: [B, H, T]; the queries are the last `queries` of the T positions.
    """
    born, dies = (bound.flatten(0, 1) for bound in seen_by_queries(lifespans, queries))
    return [_sweep(*each, queries, block) for each in zip(born, dies, _row_starts(born), strict=True)]


def _row_starts(rows: Tensor) -> list[int]:
    return [row * rows.shape[1] for row in range(rows.shape[0])]


def _sweep(born: Tensor, dies: Tensor, row_start: int, queries: int, block: int) -> list[LivingList]:
    """The lists of one head, whose terms begin at row_start in the row of all heads."""
    terms = (dies > born).nonzero().flatten()
    first = born[terms]
    if bool((first[1:] < first[:-1]).any()):
        first, order = first.sort(stable=True)
        terms = terms[order]
    last = dies[terms]
    terms = terms + row_start
    bounds = torch.arange(block, queries + block, block, dtype=first.dtype, device=first.device)
    ends = torch.searchsorted(first, bounds).tolist()
    lists = []
    alive, deaths = terms[:0], last[:0]
    for number, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        start = number * block
        kept = (deaths > start).nonzero().flatten()
        alive, deaths = alive[kept], deaths[kept]
        dying = deaths < start + block
        # Terms born in the block, and those that die in it, are partial; all its queries see the others.
        partial = torch.cat([terms[begin:end], alive[dying]])
        lists.append(LivingList(torch.cat([partial, alive[~dying]]), len(partial)))
        alive, deaths = torch.cat([alive, terms[begin:end]]), torch.cat([deaths, last[begin:end]])
    return lists
