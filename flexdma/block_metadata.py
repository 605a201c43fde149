"""Which blocks FlexAttention visits, from lifespans, at block resolution.

A tile is `rows` consecutive query rows by `columns` consecutive keys.  With grouped queries the rows are folded: row
i * group + g is query i of the group's head g, so that all heads of a group share one mask and one visit of each key
block, and a tile spans only rows / group positions.

Key j is alive in row blocks first[j] .. last[j].  +1 at first and -1 after last, summed per key block and cumulated over
row blocks, counts the visible keys of every tile: it is not empty iff the count is positive.  It is full iff no key of the
block is born after the tile's first position or dies before its last.  O(K) + one int per tile; nothing is Q x K.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from flexdma.opaque import opaque_on_cpu
from flexdma.order_statistics import scattered
from flexdma.signatures import MaskMod


def ceil_div(numerator: int, denominator: int) -> int:
    """The smallest integer not below the quotient."""
    return -(-numerator // denominator)


def _empty_metadata(
    birth: Tensor,
    death: Tensor,
    queries: int,
    group: int,
    rows: int,
    columns: int,
    transposed: bool,
    most: int | None = None,
) -> list[Tensor]:
    batch, heads, keys = birth.shape
    row_blocks, key_blocks = ceil_div(queries * group, rows), ceil_div(keys, columns)
    entries = key_blocks if most is None or most >= key_blocks else most + 1
    numbers = [birth.new_empty((batch, heads, row_blocks)), birth.new_empty((batch, heads, row_blocks, entries))] * 2
    if transposed:
        numbers += [
            birth.new_empty((batch, heads, key_blocks)),
            birth.new_empty((batch, heads, key_blocks, row_blocks)),
        ] * 2
    return [torch.empty_like(number) for number in numbers]


@opaque_on_cpu("block_metadata", _empty_metadata)
def block_metadata(
    birth: Tensor,
    death: Tensor,
    queries: int,
    group: int,
    rows: int,
    columns: int,
    transposed: bool,
    most: int | None = None,
) -> list[Tensor]:
    """Numbers and indices of the partial and the full blocks of every row block, and transposed for the backward.

    birth, death: [B, H, K] int32; the queries are the last `queries` of the K positions, `group` rows each.
    most: a bound on the key blocks that a row block visits, which must hold (`packing.most_visited`): the indices of row
        blocks are then [B, H, R, most + 1] where that is smaller.  Those of key blocks have no such bound: a key may live on.
    Returns int32 tensors [partial number, partial indices, full number, full indices], of shapes [B, H, R] and
    [B, H, R, C] with R row blocks and C key blocks; with `transposed` four more, [B, H, C] and [B, H, C, R].

    indices[..., :number] are sorted, unique and in range, the rest of each row holds the other blocks and no kernel reads
    it; partial and full are disjoint; rows are contiguous in memory (the compiled kernel is silently wrong otherwise).
    """
    length = birth.shape[-1]
    row_blocks, key_blocks = ceil_div(queries * group, rows), ceil_div(length, columns)
    first_query = length - queries
    # Rows beyond the end of K: empty lifespans, never visible, and their block is never full.
    padding = (0, key_blocks * columns - length)
    birth = pad(birth, padding).unflatten(-1, (key_blocks, columns)).long() - first_query
    death = pad(death, padding).unflatten(-1, (key_blocks, columns)).long() - first_query

    seen = (death > birth.clamp(min=0)) & (birth < queries)
    first = birth.clamp(0, queries - 1) * group // rows
    last = (death.clamp(1, queries) * group - 1) // rows
    steps = torch.zeros(*birth.shape[:-1], row_blocks + 1, dtype=torch.int32, device=birth.device)
    steps.scatter_add_(-1, first, seen.int()).scatter_add_(-1, last + 1, -seen.int())
    visited = steps.cumsum(-1, dtype=torch.int32)[..., :row_blocks] > 0  # [B, H, C, R]

    row = torch.arange(row_blocks, device=birth.device)
    first_position = row * rows // group
    last_position = ((row + 1) * rows).clamp(max=queries * group).sub(1) // group
    full = (birth.amax(-1, keepdim=True) <= first_position) & (death.amin(-1, keepdim=True) > last_position)

    partial = visited & ~full
    metadata = _ordered(partial.mT, most) + _ordered(full.mT, most)
    return metadata + _ordered(partial) + _ordered(full) if transposed else metadata


def _ordered(chosen: Tensor, most: int | None = None) -> list[Tensor]:
    """[..., n] bool -> how many are chosen [...], and all indices [..., n] with the chosen ones first, in order.

    With `most` < n no row has more chosen: the indices are [..., most + 1], the last for those that are not.
    """
    n = chosen.shape[-1]
    indices = torch.arange(n, device=chosen.device, dtype=torch.int32).expand(chosen.shape)
    before = chosen.cumsum(-1, dtype=torch.int32)
    number = chosen.sum(-1, dtype=torch.int32)
    if most is None or most >= n:
        place = torch.where(chosen, before - 1, number[..., None] + indices - before)
        return [number, scattered(indices, place.long())]
    place = torch.where(chosen, before - 1, most)
    ordered = torch.zeros(*chosen.shape[:-1], most + 1, dtype=torch.int32, device=chosen.device)
    return [number, ordered.scatter_(-1, place.long(), indices)]


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
