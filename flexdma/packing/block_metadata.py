"""Which blocks FlexAttention visits, from lifespans, at block resolution.

A tile is `rows` consecutive query rows by `columns` consecutive keys.  With grouped queries the rows are folded: row
i * group + g is query i of the group's head g, so that all heads of a group share one mask and one visit of each key
block, and a tile spans only rows / group positions.

Key j is alive in row blocks first[j] .. last[j].  +1 at first and -1 after last, summed per key block and cumulated over
row blocks, counts the visible keys of every tile: it is not empty iff the count is positive.  It is full iff no key of the
block is born after the tile's first position or dies before its last.  O(K) + one int per tile; nothing is Q x K.  Packed
keys are seen by queries of their own period alone, so that the tiles are few: O(K) in all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from flexdma.lifespans.order_statistics import scattered
from flexdma.opaque import opaque_on_cpu
from flexdma.rounding import ceil_div
from flexdma.signatures import MaskMod


def _empty_metadata(
    birth: Tensor,
    death: Tensor,
    queries: int,
    group: int,
    rows: int,
    columns: int,
    transposed: bool,
    periods: int = 1,
    period: int = 0,
) -> list[Tensor]:
    batch, heads, places = birth.shape
    row_blocks, key_blocks = ceil_div(queries * group, rows), ceil_div(places, columns)
    shapes = [(row_blocks, key_blocks // periods)]
    if transposed:
        shapes += [(key_blocks, row_blocks if periods == 1 else period * group // rows)]
    lists = [[birth.new_empty((batch, heads, n)), birth.new_empty((batch, heads, n, m))] for n, m in shapes]
    return [torch.empty_like(tensor) for pair in lists for tensor in pair * 2]


@opaque_on_cpu("block_metadata", _empty_metadata)
def block_metadata(
    birth: Tensor,
    death: Tensor,
    queries: int,
    group: int,
    rows: int,
    columns: int,
    transposed: bool,
    periods: int = 1,
    period: int = 0,
) -> list[Tensor]:
    """Numbers and indices of the partial and the full blocks of every row block, and transposed for the backward.

    birth, death: [B, H, L] int32, the queries (0 = the first) that see a key; `group` rows for each of the queries.
    periods, period: the keys come in so many runs of equal length, a whole number of blocks each, and those of run p are
        seen by queries from p * period to (p + 1) * period alone, a whole number of row blocks.  1: all by all.
    Returns int32 tensors [partial number, partial indices, full number, full indices], of shapes [B, H, R] and
    [B, H, R, C] with R row blocks and C key blocks of a period; with `transposed` four more, [B, H, all key blocks] and
    [B, H, all key blocks, row blocks of a period].

    indices are in range, and indices[..., :number] sorted and unique; the rest of each row holds other blocks and no kernel
    reads it; partial and full are disjoint; rows are contiguous in memory (the compiled kernel is silently wrong otherwise).
    """
    places = birth.shape[-1]
    row_blocks, key_blocks = ceil_div(queries * group, rows), ceil_div(places, columns)
    rows_each = row_blocks if periods == 1 else period * group // rows
    keys_each = key_blocks // periods
    # Places beyond the end: empty lifespans, never visible, and their block is never full.
    padding = (0, key_blocks * columns - places)
    birth = pad(birth, padding).unflatten(-1, (periods, keys_each, columns)).long()
    death = pad(death, padding).unflatten(-1, (periods, keys_each, columns)).long()

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
    full = full & visited

    by_row = [
        mask.transpose(-1, -2).flatten(2, 3)[:, :, :row_blocks] for mask in (visited & ~full, full)
    ]  # [B, H, R, C]
    row = torch.arange(row_blocks, device=birth.device)[:, None]
    metadata = [t for mask in by_row for t in _ordered(mask, row // rows_each * keys_each, key_blocks)]
    if transposed:
        by_key = [mask.flatten(2, 3) for mask in (visited & ~full, full)]
        key = torch.arange(key_blocks, device=birth.device)[:, None]
        metadata += [t for mask in by_key for t in _ordered(mask, key // keys_each * rows_each, row_blocks)]
    return metadata


def _ordered(chosen: Tensor, first: Tensor, end: int) -> list[Tensor]:
    """[..., n] bool -> how many are chosen [...], and all indices [..., n] with the chosen ones first, in order.

    Indices count from `first`, those of the last period no further than to `end`.
    """
    n = chosen.shape[-1]
    indices = torch.arange(n, device=chosen.device, dtype=torch.int32)
    before = chosen.cumsum(-1, dtype=torch.int32)
    number = chosen.sum(-1, dtype=torch.int32)
    place = torch.where(chosen, before - 1, number[..., None] + indices - before)
    return [number, scattered((first + indices).clamp(max=end - 1).int().expand(chosen.shape), place.long())]


def block_mask_from(
    metadata: Sequence[Any], lengths: tuple[int, int], block_size: tuple[int, int], mask_mod: MaskMod
) -> BlockMask:
    """The BlockMask of `block_metadata`'s 4 tensors (inference only) or 8."""
    number, indices, full_number, full_indices, *transposed = metadata
    q_number, q_indices, full_q_number, full_q_indices = transposed if transposed else [None] * 4
    # By keyword: the order of the arguments differs between torch 2.11 and 2.13.
    return BlockMask(
        seq_lengths=lengths,
        kv_num_blocks=number,
        kv_indices=indices,
        full_kv_num_blocks=full_number,
        full_kv_indices=full_indices,
        q_num_blocks=q_number,
        q_indices=q_indices,
        full_q_num_blocks=full_q_number,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
    )
