"""The inputs of a FlexAttention kernel: packed keys and the blocks to visit, computed from lifespans in one operator."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexdma.lifespans import Lifespans
from flexdma.opaque import opaque_on_cpu
from flexdma.packing.block_index import BlockIndex, block_index
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
    any_births: bool = False,
) -> tuple[Packing, BlockIndex]:
    """Packed keys and the blocks to visit.

    lifespans: birth, death [B, H, K]; the queries are the last `queries` of the K positions, `group` rows each.
    capacity: upper bound on the keys that one query sees.
    block_size: (rows, columns) of a mask block.  transposed: see `block_index`.  any_births: see `packed_layout`.
    """
    rows, columns = block_size
    layout = packed_layout(
        queries, lifespans.birth.shape[-1], capacity, block_size=block_size, group=group, any_births=any_births
    )
    order, birth, death, pieces, starts, *index = _schedule(
        *lifespans, queries, group, capacity, rows, columns, transposed, any_births
    )
    return Packing(order, birth, death, pieces, starts, layout), BlockIndex.of(index)


def _empty_schedule(
    birth: Tensor,
    death: Tensor,
    queries: int,
    group: int,
    capacity: int,
    rows: int,
    columns: int,
    transposed: bool,
    any_births: bool,
) -> list[Tensor]:
    batch, heads, keys = birth.shape
    layout = packed_layout(queries, keys, capacity, block_size=(rows, columns), group=group, any_births=any_births)
    placed = birth.new_empty((batch, heads, layout.total))
    index = _index(placed, placed, queries, group, rows, columns, transposed, layout)
    return [
        *map(torch.empty_like, [placed] * 4),
        birth.new_empty((batch, heads, keys + 1)),
        *map(torch.empty_like, index),
    ]


@opaque_on_cpu("schedule", _empty_schedule)
def _schedule(
    birth: Tensor,
    death: Tensor,
    queries: int,
    group: int,
    capacity: int,
    rows: int,
    columns: int,
    transposed: bool,
    any_births: bool,
) -> list[Tensor]:
    layout = packed_layout(
        queries, birth.shape[-1], capacity, block_size=(rows, columns), group=group, any_births=any_births
    )
    *packing, _ = pack(Lifespans(birth, death), layout, queries=queries)
    _, birth, death, *_ = packing
    return [*packing, *_index(birth, death, queries, group, rows, columns, transposed, layout)]


def _index(
    birth: Tensor, death: Tensor, queries: int, group: int, rows: int, columns: int, transposed: bool, layout: Layout
) -> list[Tensor]:
    index = block_index(
        birth,
        death,
        queries=queries,
        group=group,
        block_size=(rows, columns),
        transposed=transposed,
        periods=layout.periods if layout.unit is None else 1,
        period=layout.period,
    )
    if birth.device.type == "cpu":
        # Inductor's C++ FlexAttention needs lists with room for the key blocks of all periods.
        missing = (0, ceil_div(birth.shape[-1], columns) - index.partial_indices.shape[-1])
        index = index._replace(
            partial_indices=pad(index.partial_indices, missing), full_indices=pad(index.full_indices, missing)
        )
    return index.tensors()
