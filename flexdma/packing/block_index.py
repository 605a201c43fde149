"""Lifespans -> the blocks that FlexAttention visits.

A tile is `rows` consecutive query rows by `columns` consecutive keys.  With grouped queries the rows are folded: row
i * group + g is query i of the group's head g.  All heads of a group then share one mask and one visit of each key block,
and a tile spans only rows / group positions.

Key j is alive in row blocks first[j] .. last[j].  +1 at first and -1 after last, summed per key block and cumulated over
row blocks, counts the visible keys of every tile.  A tile is empty iff its count is 0.  It is full iff no key of the block
is born after the tile's first position or dies at or before its last.  O(K) + one int per tile; no Q x K tensor exists.
Queries of one period see packed keys of that period only, so the number of tiles is O(K).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from flexdma.lifespans.order_statistics import scattered
from flexdma.opaque import apart, opaque_on_cpu
from flexdma.packing.rows import FoldedRows
from flexdma.rounding import ceil_div
from flexdma.signatures import MaskMod


class BlockIndex(NamedTuple):
    """The blocks that a kernel visits; R row blocks, C key blocks of a period (of all keys where there is one period).

    A kernel applies the mask in partial blocks only.  In a full block every query sees every key.  No block is both, and a
    block that is neither has no visible key.

    partial_num, full_num: [B, H, R] int32, the number of key blocks of either kind that a row block visits.  Contiguous.
    partial_indices, full_indices: [B, H, R, C] int32, those blocks: `indices[b, h, r, :num]` are sorted, unique and in range.
        The rest of a row holds other blocks and is never read.  Contiguous: a compiled kernel reads a view silently wrong.
    transposed: the same for each key block, [B, H, all key blocks] and [B, H, all key blocks, row blocks of a period], for a
        backward; None without one.
    """

    partial_num: Tensor
    partial_indices: Tensor
    full_num: Tensor
    full_indices: Tensor
    transposed: "BlockIndex | None" = None

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "BlockIndex":
        """The inverse of `tensors()`."""
        partial_num, partial_indices, full_num, full_indices, *transposed = tensors
        by_key = cls.of(transposed) if transposed else None
        return cls(partial_num, partial_indices, full_num, full_indices, by_key)

    def tensors(self) -> list[Tensor]:
        """Its 4 tensors, then the transposed ones if there are any: 4 or 8."""
        return [*self[:4], *(self.transposed[:4] if self.transposed else ())]

    def visited(self) -> Tensor:
        """[B, H, R]: the number of key blocks that each row block visits."""
        return self.partial_num + self.full_num

    def block_mask(self, lengths: tuple[int, int], block_size: tuple[int, int], mask_mod: MaskMod) -> BlockMask:
        """FlexAttention's BlockMask of (rows, keys) = lengths.  Without `transposed` it has no backward."""
        by_key = self.transposed
        # By keyword: the order of the arguments differs between torch 2.11 and 2.13.
        return BlockMask(
            seq_lengths=lengths,
            kv_num_blocks=self.partial_num,
            kv_indices=self.partial_indices,
            full_kv_num_blocks=self.full_num,
            full_kv_indices=self.full_indices,
            q_num_blocks=None if by_key is None else by_key.partial_num,
            q_indices=None if by_key is None else by_key.partial_indices,
            full_q_num_blocks=None if by_key is None else by_key.full_num,
            full_q_indices=None if by_key is None else by_key.full_indices,
            BLOCK_SIZE=block_size,
            mask_mod=mask_mod,
        )


def block_index(
    birth: Tensor,
    death: Tensor,
    *,
    rows: FoldedRows,
    block_size: tuple[int, int],
    transposed: bool = False,
    periods: int = 1,
    period: int = 0,
) -> BlockIndex:
    """The blocks to visit, for keys in any order.

    birth, death: [B, H, L] int32, the queries (0 = the first) that see a key.  rows: of each KV head.
    block_size: (rows, columns).  transposed: also list the row blocks of each key block, for a backward.
    periods, period: the L places are `periods` runs of equal length, a whole number of key blocks each.  Only queries from
        p * period to (p + 1) * period, a whole number of row blocks, see the keys of run p.  With periods=1 all queries may
        see all keys.
    O(L) time and memory, and one int per pair of a row block and a key block of its period.
    """
    return BlockIndex.of(_block_index(birth, death, *rows, *block_size, transposed, periods, period))


def listed_blocks(partial: Tensor, full: Tensor) -> BlockIndex:
    """The index of blocks that are given one by one, with its transposed lists.

    partial, full: [B, H, R, C] bool; no block is both.  O(R C) time and memory per head.
    """
    return BlockIndex.of(_listed_blocks(partial, full))


def _empty_lists(partial: Tensor, full: Tensor) -> list[Tensor]:
    lists = [[mask[..., 0], mask] for mask in (partial, full, partial.mT, full.mT)]
    return [torch.empty(t.shape, dtype=torch.int32, device=t.device) for pair in lists for t in pair]


@opaque_on_cpu("listed_blocks", _empty_lists)
def _listed_blocks(partial: Tensor, full: Tensor) -> list[Tensor]:
    masks = [mask.contiguous() for mask in (partial, full, partial.mT, full.mT)]
    return [t for mask in masks for t in _ordered(mask, torch.arange(mask.shape[-1], device=mask.device))]


def _empty_index(
    birth: Tensor,
    death: Tensor,
    queries: int,
    group: int,
    by_head: bool,
    rows: int,
    columns: int,
    transposed: bool,
    periods: int,
    period: int,
) -> list[Tensor]:
    batch, heads, places = birth.shape
    folded = FoldedRows(queries, group, by_head)
    positions = queries if periods == 1 else period
    row_blocks, key_blocks = ceil_div(queries * folded.per_position, rows), ceil_div(places, columns)
    shapes = [(folded.repeats * row_blocks, key_blocks // periods)]
    if transposed:
        shapes += [(key_blocks, folded.repeats * ceil_div(positions * folded.per_position, rows))]
    lists = [[birth.new_empty((batch, heads, n)), birth.new_empty((batch, heads, n, m))] for n, m in shapes]
    return [torch.empty_like(tensor) for pair in lists for tensor in pair * 2]


@opaque_on_cpu("block_index", _empty_index)
def _block_index(
    birth: Tensor,
    death: Tensor,
    queries: int,
    group: int,
    by_head: bool,
    rows: int,
    columns: int,
    transposed: bool,
    periods: int,
    period: int,
) -> list[Tensor]:
    folded, device = FoldedRows(queries, group, by_head), birth.device
    each, repeats = folded.per_position, folded.repeats
    row_blocks, key_blocks = ceil_div(queries * each, rows), ceil_div(birth.shape[-1], columns)
    visited, full = _tiles(birth, death, queries, each, rows, columns, periods, period)
    keys_each, rows_each = visited.shape[-2:]
    # Masks are repeated before they become lists: Inductor then makes the lists of all heads in the same launches.
    by_row = [
        mask.transpose(-1, -2).flatten(2, 3)[:, :, :row_blocks].repeat(1, 1, repeats, 1)
        for mask in (visited & ~full, full)
    ]  # [B, H, R, C]
    row, key = torch.arange(row_blocks, device=device), torch.arange(key_blocks, device=device)
    keys_of_row = row[:, None] // rows_each * keys_each + key[:keys_each]
    if periods == 1:
        # Inductor splits long sums that it reads across rows, and torch 2.11 fails to generate these.
        by_row = [apart(mask) for mask in by_row]
    index = [t for mask in by_row for t in _ordered(mask, keys_of_row.repeat(repeats, 1))]
    if transposed:
        by_key = [mask.flatten(2, 3).repeat(1, 1, 1, repeats) for mask in (visited & ~full, full)]
        rows_of_key = key[:, None] // keys_each * rows_each + torch.arange(rows_each, device=device)
        of_heads = row_blocks * torch.arange(repeats, device=device)[:, None] + rows_of_key[:, None].clamp(
            max=row_blocks - 1
        )
        index += [t for mask in by_key for t in _ordered(mask, of_heads.flatten(1))]
    return index


def count_visited(
    birth: Tensor, death: Tensor, *, queries: int, group: int = 1, block_size: tuple[int, int], periods: int = 1,
    period: int = 0,
) -> Tensor:  # fmt: skip
    """The number of visited blocks of all heads, int64, without their lists; each query has `group` consecutive rows.

    Other arguments as in `block_index`.
    """
    return _tiles(birth, death, queries, group, *block_size, periods, period)[0].sum()


def _tiles(
    birth: Tensor, death: Tensor, queries: int, group: int, rows: int, columns: int, periods: int, period: int
) -> tuple[Tensor, Tensor]:
    """Whether a tile is visited, and whether it is full: two [B, H, periods, C, row blocks of a period] bool."""
    row_blocks, key_blocks = ceil_div(queries * group, rows), ceil_div(birth.shape[-1], columns)
    rows_each = row_blocks if periods == 1 else period * group // rows
    # Places beyond the end have birth = death = 0: they are never visible, and their block is never full.
    padding = (0, key_blocks * columns - birth.shape[-1])
    birth = (
        pad(birth, padding).unflatten(-1, (periods, key_blocks // periods, columns)).long()
    )  # [B, H, periods, C, columns]
    death = pad(death, padding).unflatten(-1, (periods, key_blocks // periods, columns)).long()

    seen = (death > birth.clamp(min=0)) & (birth < queries)
    before = rows_each * torch.arange(periods, device=birth.device).view(-1, 1, 1)  # row blocks of earlier periods
    first = (birth.clamp(0, queries - 1) * group // rows - before).clamp(0, rows_each)
    last = ((death.clamp(1, queries) * group - 1) // rows - before).clamp(0, rows_each - 1)
    steps = torch.zeros(*birth.shape[:-1], rows_each + 1, dtype=torch.int32, device=birth.device)
    steps = steps.scatter_add(-1, first, seen.int()).scatter_add(-1, last + 1, -seen.int())
    visited = steps.cumsum(-1, dtype=torch.int32)[..., :rows_each] > 0  # [B, H, periods, C, rows_each]

    row = before.view(-1, 1, 1) + torch.arange(rows_each, device=birth.device)
    first_position = row * rows // group
    last_position = ((row + 1) * rows).clamp(max=queries * group).sub(1) // group
    full = (birth.amax(-1, keepdim=True) <= first_position) & (death.amin(-1, keepdim=True) > last_position)
    return visited, full & visited


def _ordered(chosen: Tensor, blocks: Tensor) -> list[Tensor]:
    """[..., n] bool -> the number of chosen ones [...], and all blocks [..., n], chosen ones first, in order.

    blocks: [..., n] of fewer or equal leading dimensions, the block that each of `chosen` stands for.
    """
    indices = torch.arange(chosen.shape[-1], device=chosen.device, dtype=torch.int32)
    before = chosen.cumsum(-1, dtype=torch.int32)
    # FlexAttention reads counts at (b H + h) stride(1).  Where H = 1, a sum of [B, H, R, n] may have another stride(1).
    number = chosen.flatten(0, -2).sum(-1, dtype=torch.int32).view(chosen.shape[:-1])
    place = torch.where(chosen, before - 1, number[..., None] + indices - before)
    return [number, scattered(blocks.int().expand(chosen.shape), place.long())]
