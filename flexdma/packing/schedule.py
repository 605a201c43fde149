"""What a FlexAttention kernel is given: keys at their places, and the blocks to visit, from lifespans in one operator."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexdma.lifespans import Lifespans
from flexdma.opaque import opaque_on_cpu
from flexdma.packing.block_metadata import block_metadata
from flexdma.packing.places import Layout, Packing, pack, packed_layout
from flexdma.rounding import ceil_div


def schedule(
    lifespans: Lifespans,
    *,
    queries: int,
    group: int,
    capacity: int,
    block_size: tuple[int, int],
    transposed: bool,
) -> tuple[Packing, list[Tensor]]:
    """Packed keys, and the `block_metadata` of them.

    lifespans: birth, death [B, H, K]; the queries are the last `queries` of the K positions, `group` rows each.
    capacity: no query sees more keys.
    block_size: (rows, columns) of a mask block.  transposed: for a backward, too.
    """
    rows, columns = block_size
    layout = packed_layout(queries, lifespans.birth.shape[-1], capacity, block_size=block_size, group=group)
    order, birth, death, pieces, starts, *metadata = _schedule(
        *lifespans, queries, group, capacity, rows, columns, transposed
    )
    return Packing(order, birth, death, pieces, starts, layout), metadata


def _empty_schedule(
    birth: Tensor, death: Tensor, queries: int, group: int, capacity: int, rows: int, columns: int, transposed: bool
) -> list[Tensor]:
    batch, heads, keys = birth.shape
    layout = packed_layout(queries, keys, capacity, block_size=(rows, columns), group=group)
    placed = birth.new_empty((batch, heads, layout.periods * layout.places))
    metadata = _metadata(placed, placed, queries, group, rows, columns, transposed, layout)
    return [
        *map(torch.empty_like, [placed] * 4),
        birth.new_empty((batch, heads, keys + 1)),
        *map(torch.empty_like, metadata),
    ]


@opaque_on_cpu("schedule", _empty_schedule)
def _schedule(
    birth: Tensor, death: Tensor, queries: int, group: int, capacity: int, rows: int, columns: int, transposed: bool
) -> list[Tensor]:
    layout = packed_layout(queries, birth.shape[-1], capacity, block_size=(rows, columns), group=group)
    *packing, _ = pack(Lifespans(birth, death), layout, queries=queries)
    _, birth, death, *_ = packing
    return [*packing, *_metadata(birth, death, queries, group, rows, columns, transposed, layout)]


def _metadata(
    birth: Tensor, death: Tensor, queries: int, group: int, rows: int, columns: int, transposed: bool, layout: Layout
) -> list[Tensor]:
    metadata = block_metadata(birth, death, queries, group, rows, columns, transposed, layout.periods, layout.period)
    if birth.device.type == "cpu":
        # The C++ lowering wants room for the key blocks of all periods.
        missing = ceil_div(birth.shape[-1], columns) - metadata[1].shape[-1]
        metadata[1], metadata[3] = (pad(metadata[n], (0, missing)) for n in (1, 3))
    return metadata
