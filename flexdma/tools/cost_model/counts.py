"""What lifespans amount to: keys seen, steps lived, blocks visited.  Exact counts; nothing is Q x K."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexdma.lifespans import Lifespans
from flexdma.packing.block_index import BlockIndex, block_index
from flexdma.packing.schedule import schedule


@dataclass(frozen=True)
class KeyCounts:
    """Keys of one head, or the means over heads.  Keys, steps and queries are means over the batch."""

    ever_visible: float  # keys that at least one query sees; as a causal selection, also queries that see their own key
    share: float  # the same, of all K keys
    mean_lifespan: float  # steps, over the keys ever visible; 0 where there are none
    median_lifespan: float
    visible_per_query: float


@dataclass(frozen=True)
class BlockCounts:
    """Mask blocks (tiles) of one head, or the means over heads; means over the batch."""

    visited: float
    full: float  # visited, and every key of the block visible to every row: no mask is computed
    over_ideal: float  # visited / (visible pairs / pairs of a block); 0 where nothing is visible
    over_causal: float  # visited / blocks of a causal mask


def key_counts(lifespans: Lifespans) -> list[KeyCounts]:
    """One per head."""
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


def blocks(lifespans: Lifespans, group: int, block_size: tuple[int, int], capacity: int | None = None) -> BlockIndex:
    """The blocks that a kernel visits; `group` query heads are folded into the rows of a block.

    capacity: upper bound on keys visible to one query; keys are packed.  None: keys stay in the order given.
    """
    length = lifespans.birth.shape[-1]
    if capacity is None:
        return block_index(*lifespans, queries=length, group=group, block_size=block_size)
    sizes: dict[str, Any] = {"queries": length, "group": group, "capacity": capacity, "block_size": block_size}
    _, index = schedule(lifespans, **sizes, transposed=False)
    return index


def block_counts(
    lifespans: Lifespans, group: int, block_size: tuple[int, int], capacity: int | None = None
) -> list[BlockCounts]:
    """One per head; arguments as of `blocks`."""
    rows, columns = block_size
    index = blocks(lifespans, group, block_size, capacity)
    visited, full = (number.sum(-1).double().mean(0) for number in (index.visited(), index.full_num))
    ideal = (lifespans.death - lifespans.birth).long().sum(-1).double().mean(0) * group / (rows * columns)
    causal = causal_blocks(lifespans.birth.shape[-1], group, block_size)
    return [
        BlockCounts(each, whole, each / at_best if at_best else 0.0, each / causal)
        for each, whole, at_best in zip(visited.tolist(), full.tolist(), ideal.tolist(), strict=True)
    ]


def visited_pairs(lifespans: Lifespans, group: int, block_size: tuple[int, int], capacity: int | None = None) -> int:
    """Pairs of a query and a key in the visited blocks, of all heads; arguments as of `blocks`."""
    rows, columns = block_size
    return int(blocks(lifespans, group, block_size, capacity).visited().sum()) * rows * columns


def causal_blocks(length: int, group: int, block_size: tuple[int, int]) -> int:
    """Blocks of the mask j <= i, per head."""
    birth = torch.arange(length, dtype=torch.int32).view(1, 1, -1)
    everything = Lifespans(birth, torch.full_like(birth, length))
    return int(blocks(everything, group, block_size).visited().sum())


def evictions(lifespans: Lifespans, everything: Lifespans) -> int:
    """Keys that die before they would by causality, documents and padding alone."""
    return int((lifespans.death < everything.death).sum())


def same_mask(lifespans: Lifespans, other: Lifespans) -> bool:
    """Whether the two show every query the same keys."""
    return torch.equal(_span(lifespans), _span(other))


def _span(lifespans: Lifespans) -> Tensor:
    return torch.where(lifespans.death > lifespans.birth, lifespans.death, -1)
