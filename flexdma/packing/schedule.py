"""The inputs of a FlexAttention kernel: packed keys and the blocks to visit, computed from lifespans in one operator."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexdma.lifespans import Lifespans
from flexdma.opaque import opaque_on_cpu
from flexdma.packing.block_index import BlockIndex, block_index
from flexdma.packing.places import Layout, Packing, layout_in_order, pack, packed_layout
from flexdma.packing.rows import FoldedRows
from flexdma.rounding import ceil_div


def schedule(
    lifespans: Lifespans,
    *,
    rows: FoldedRows,
    capacity: int,
    block_size: tuple[int, int],
    transposed: bool,
    any_births: bool = False,
    ranked: bool = True,
    packed: bool = True,
) -> tuple[Packing, BlockIndex]:
    """Packed keys and the blocks to visit.

    lifespans: birth, death [B, H, K].  rows: of a KV head; their queries are the last of the K positions.
    capacity: upper bound on the keys that one query sees.
    block_size: (rows, columns) of a mask block.  transposed: see `block_index`.  any_births, ranked: see `packed_layout`.
    packed: False = keys stay in their own order.
    """
    queries, group, keys = rows.queries, rows.per_position, lifespans.birth.shape[-1]
    if packed:
        layout = packed_layout(
            queries, keys, capacity, block_size=block_size, group=group, any_births=any_births, ranked=ranked
        )
    else:
        layout = layout_in_order(queries, keys, block_size=block_size, group=group)
    numbers = [layout.period, layout.periods, layout.places, layout.unit or 0, int(layout.by_death)]
    order, birth, death, pieces, starts, *index = _schedule(
        *lifespans, queries, rows.group, rows.by_head, *block_size, transposed, numbers
    )
    return Packing(order, birth, death, pieces, starts, layout), BlockIndex.of(index)


def _layout(numbers: list[int]) -> Layout:
    """The layout whose fields are these: operators take no tuples.  A unit of 0 is None."""
    period, periods, places, unit, by_death = numbers
    return Layout(period, periods, places, unit or None, bool(by_death))


def _empty_schedule(
    birth: Tensor,
    death: Tensor,
    queries: int,
    group: int,
    by_head: bool,
    rows: int,
    columns: int,
    transposed: bool,
    layout: list[int],
) -> list[Tensor]:
    batch, heads, keys = birth.shape
    places = _layout(layout)
    placed = birth.new_empty((batch, heads, places.total))
    index = _index(placed, placed, FoldedRows(queries, group, by_head), (rows, columns), transposed, places)
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
    by_head: bool,
    rows: int,
    columns: int,
    transposed: bool,
    layout: list[int],
) -> list[Tensor]:
    places = _layout(layout)
    *packing, _ = pack(Lifespans(birth, death), places, queries=queries)
    _, birth, death, *_ = packing
    return [*packing, *_index(birth, death, FoldedRows(queries, group, by_head), (rows, columns), transposed, places)]


def _index(
    birth: Tensor, death: Tensor, rows: FoldedRows, block_size: tuple[int, int], transposed: bool, layout: Layout
) -> list[Tensor]:
    index = block_index(
        birth,
        death,
        rows=rows,
        block_size=block_size,
        transposed=transposed,
        periods=layout.periods if layout.unit is None else 1,
        period=layout.period,
    )
    if birth.device.type == "cpu":
        # Inductor's C++ FlexAttention needs lists with room for the key blocks of all periods.
        missing = (0, ceil_div(birth.shape[-1], block_size[1]) - index.partial_indices.shape[-1])
        index = index._replace(
            partial_indices=pad(index.partial_indices, missing), full_indices=pad(index.full_indices, missing)
        )
    return index.tensors()
