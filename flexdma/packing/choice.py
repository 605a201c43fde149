"""The order of keys in which a kernel visits fewer blocks: packed by lifespan, or their own.

Packing pays where keys of one block die at different times.  Windows and documents are dense in the keys' own order, and a
few long-lived keys among them, as sinks, only shift packed keys against the blocks.
"""

import torch
from torch import Tensor

from flexdma.compiled import compiled_on_gpu
from flexdma.lifespans import Lifespans
from flexdma.lifespans.visible import seen_by_queries
from flexdma.packing.block_index import count_visited
from flexdma.packing.places import Layout, pack, packed_layout
from flexdma.packing.rows import FoldedRows
from flexdma.rounding import ceil_div

# In their own order every row block may visit every key block.  Above this many pairs of blocks for each key the lists of
# blocks would be as large as keys and values; packed keys have lists of a bounded length.
PAIRS_EACH = 32
# No order visits fewer blocks than the pairs of the mask fill.  Within this share of that packing is not tried.
SLACK = 0.05


def packing_saves(
    lifespans: Lifespans,
    *,
    rows: FoldedRows,
    capacity: int,
    block_size: tuple[int, int],
    any_births: bool = False,
    ranked: bool = True,
) -> bool:
    """Whether a kernel visits fewer blocks of packed keys than of keys in their own order.  Reads the device.

    False too where keys in their own order visit at most SLACK more blocks than the pairs of the mask fill.

    Arguments as in `flexdma.packing.schedule.schedule`.  O(K log K) time; no list of blocks is made.
    """
    queries, group = rows.queries, rows.per_position
    keys = lifespans.birth.shape[-1]
    if ceil_div(rows.total, block_size[0]) * ceil_div(keys, block_size[1]) > PAIRS_EACH * keys:
        return True
    own, pairs = _blocks_and_pairs(*lifespans, queries, group, *block_size).tolist()
    if own * block_size[0] * block_size[1] <= pairs * group * (1 + SLACK):
        return False
    layout = packed_layout(
        queries, keys, capacity, block_size=block_size, group=group, any_births=any_births, ranked=ranked
    )
    return int(_packed_blocks(*lifespans, queries, group, *block_size, layout)) < own


@compiled_on_gpu
def _blocks_and_pairs(birth: Tensor, death: Tensor, queries: int, group: int, rows: int, columns: int) -> Tensor:
    """[2] int64: the blocks that keys in their own order visit, and the pairs of a query position and a key."""
    seen = seen_by_queries(Lifespans(birth, death), queries)
    own = count_visited(*seen, queries=queries, group=group, block_size=(rows, columns))
    return torch.stack((own, (seen.death - seen.birth).clamp(min=0).sum(dtype=torch.int64)))


@compiled_on_gpu
def _packed_blocks(
    birth: Tensor, death: Tensor, queries: int, group: int, rows: int, columns: int, layout: Layout
) -> Tensor:
    """The blocks that packed keys visit, int64."""
    _, birth, death, *_ = pack(Lifespans(birth, death), layout, queries=queries)
    periods = layout.periods if layout.unit is None else 1
    return count_visited(
        birth, death, queries=queries, group=group, block_size=(rows, columns), periods=periods, period=layout.period
    )
