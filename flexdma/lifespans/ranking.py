"""The ranking of keys: by gate, larger first; of equal gates the newer key first; NaN above infinity.

`by_rank` and `death_by_rank` sort, `outranks` compares two keys, `last_in_rank` finds the last of a few.
"""

import torch
from torch import Tensor

from flexdma.lifespans.order_statistics import kth_smallest, scattered
from flexdma.lifespans.prefix_statistics import kth_smallest_of_prefix
from flexdma.stages import staged

# A position above every real one.
NEVER = 2**62


@staged("ranking")
def by_rank(gate: Tensor, document_start: Tensor | None = None) -> Tensor:
    """Positions [B, H, K] in order of rank; with document_start [B, 1, K], in order of document and then of rank.

    gate: [B, H, K], keys in order of position.
    """
    # A stable sort of the reversed row, so that of equal gates the newer key comes first.  Descending, torch.sort puts NaN
    # first.
    ranked = gate.shape[-1] - 1 - gate.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    if document_start is None:
        return ranked
    # Documents are runs, so sorting by their starts gives each document one interval of ranks.
    document = document_start.expand_as(ranked).gather(-1, ranked)
    return ranked.gather(-1, document.sort(dim=-1, stable=True).indices)


def death_by_rank(ranked: Tensor, start: Tensor, end: Tensor, windows: Tensor, *, shared: bool) -> Tensor:
    """death_j = max(j, the w-th smallest position among the keys of j's document that outrank j); its end if fewer do.

    ranked: `by_rank` [B, H, K].  start, end: of each position's document, [B, 1, K] or [1].  windows: [H or 1, 1].
    shared: one top-w for all queries.  death_j is the document's end for its w best keys, j (never visible) for the others.
    """
    positions = torch.arange(ranked.shape[-1], device=ranked.device)
    rank = scattered(positions.int().expand_as(ranked), ranked).long()
    survives = rank - start < windows
    if shared:
        return torch.where(survives, end, positions)
    if ranked.device.type == "cpu":
        # The keys of earlier documents come first in rank and in position, so `start` added to k counts them.
        kth = (start + windows - 1).clamp(max=ranked.shape[-1]).expand_as(rank)
        evicted_at = kth_smallest_of_prefix(ranked, rank, kth)
    else:
        left = start.expand_as(rank).contiguous()
        evicted_at = kth_smallest(ranked.int(), left, rank, (windows - 1).expand_as(rank))
    return torch.where(survives, end, torch.maximum(evicted_at, positions))


def outranks(older: Tensor, newer: Tensor) -> Tensor:
    """Whether the older key ranks before the newer, given their gates; elementwise."""
    return (older > newer) | (older.isnan() & ~newer.isnan())


def last_in_rank(gate: Tensor, position: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Gates and positions [B, H, n] of keys in any order -> [B, H, 1]: the index of the last key in rank.

    excluded: bool, broadcastable to [B, H, n]; True = not a candidate.
    """
    unordered = gate.isnan()
    level = torch.where(unordered, float("inf"), gate.detach())
    age = torch.where(unordered, position + NEVER // 2, position)
    if excluded is not None:
        level, age = level.masked_fill(excluded, float("inf")), age.masked_fill(excluded, NEVER)
    return torch.where(level == level.amin(-1, keepdim=True), age, NEVER).argmin(-1, keepdim=True)
