"""Exact counts of lifespans: keys seen, lengths of lifespans, blocks visited.  No Q x K tensor exists."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flexdma.lifespans import Lifespans
from flexdma.packing.block_index import BlockIndex, block_index
from flexdma.packing.rows import FoldedRows
from flexdma.packing.schedule import schedule


@dataclass(frozen=True)
class KeyCounts:
    """Counts of keys of one head, or the means over heads; means over the batch."""

    ever_visible: float  # keys that at least one query sees; in a causal selection also queries that see their own key
    share: float  # ever_visible / K
    mean_lifespan: float  # queries, over the keys ever visible; 0 where there are none
    median_lifespan: float
    visible_per_query: float


@dataclass(frozen=True)
class BlockCounts:
    """Counts of mask blocks (tiles) of one head, or the means over heads; means over the batch."""

    visited: float
    full: float  # visited blocks in which every row sees every key, so that no mask is computed
    over_ideal: float  # visited / (visible pairs / pairs of a block); 0 where nothing is visible
    over_causal: float  # visited / blocks of a causal mask


def key_counts(lifespans: Lifespans) -> list[KeyCounts]:
    """The counts of each head."""
    lifetime = (lifespans.death - lifespans.birth).long()
    batch, heads, length = lifetime.shape
    counts = []
    for head in range(heads):
        steps = lifetime[:, head]
        lived = steps[steps > 0].double()
        ever, visible = len(lived) / batch, steps.sum().item() / (batch * length)
        mean, median = (lived.mean().item(), lived.median().item()) if len(lived) else (0.0, 0.0)
        counts.append(KeyCounts(ever, ever / length, mean, median, visible))
    return counts


def blocks(
    lifespans: Lifespans, rows_of_head: FoldedRows, block_size: tuple[int, int], capacity: int | None = None
) -> BlockIndex:
    """The blocks that a kernel visits.

    capacity: pack keys; upper bound on keys visible to one query.  None = keys stay in the given order.
    """
    if capacity is not None:
        return schedule(lifespans, rows=rows_of_head, capacity=capacity, block_size=block_size, transposed=False)[1]
    return block_index(*lifespans, rows=rows_of_head, block_size=block_size)


def block_counts(
    lifespans: Lifespans, rows_of_head: FoldedRows, block_size: tuple[int, int], capacity: int | None = None
) -> list[BlockCounts]:
    """The counts of each KV head; arguments as in `blocks`."""
    rows, columns = block_size
    index = blocks(lifespans, rows_of_head, block_size, capacity)
    visited, full = (number.sum(-1).double().mean(0) for number in (index.visited(), index.full_num))
    pairs = (lifespans.death - lifespans.birth).long().sum(-1).double().mean(0) * rows_of_head.group
    ideal = pairs / (rows * columns)
    causal = causal_blocks(rows_of_head, block_size)
    return [
        BlockCounts(each, whole, each / at_best if at_best else 0.0, each / causal)
        for each, whole, at_best in zip(visited.tolist(), full.tolist(), ideal.tolist(), strict=True)
    ]


def visited_pairs(
    lifespans: Lifespans, rows_of_head: FoldedRows, block_size: tuple[int, int], capacity: int | None = None
) -> int:
    """Pairs of a query and a key in the visited blocks of all heads; arguments as in `blocks`."""
    rows, columns = block_size
    return int(blocks(lifespans, rows_of_head, block_size, capacity).visited().sum()) * rows * columns


def causal_blocks(rows_of_head: FoldedRows, block_size: tuple[int, int]) -> int:
    """Blocks of the mask j <= i, per KV head."""
    length = rows_of_head.queries
    birth = torch.arange(length, dtype=torch.int32).view(1, 1, -1)
    everything = Lifespans(birth, torch.full_like(birth, length))
    return int(blocks(everything, rows_of_head, block_size).visited().sum())


def evictions(lifespans: Lifespans, everything: Lifespans) -> int:
    """Number of keys that die before `everything`, the lifespans by causality, documents and padding alone."""
    return int((lifespans.death < everything.death).sum())


def same_mask(lifespans: Lifespans, other: Lifespans) -> bool:
    """Whether every query sees the same keys under both."""
    return torch.equal(_span(lifespans), _span(other))


def _span(lifespans: Lifespans) -> Tensor:
    return torch.where(lifespans.death > lifespans.birth, lifespans.death, -1)
