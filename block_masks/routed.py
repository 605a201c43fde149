"""Routing between cells: a mask that is the same for all queries of a cell and all keys of a cell.

SeerAttention, MoBA, NSA's selection and BiFormer choose cells in different ways, then use this mask.  The mask_mod reads
the chosen cells; sums over them give the blocks to skip and the blocks to visit without the mask.  No Q x K tensor exists.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from flexdma import checks
from flexdma.lifespans import by_rank
from flexdma.opaque import realize
from flexdma.packing.block_index import BlockIndex, listed_blocks
from flexdma.rounding import ceil_div
from flexdma.signatures import MaskMod


def routed_mask_mod(
    chosen: Tensor,
    *,
    num_query_heads: int,
    cells: tuple[int, int],
    causal: bool = True,
    first_query: int = 0,
    key_padding_mask: Tensor | None = None,
) -> MaskMod:
    """True where the cell of the query has chosen the cell of the key; see `routed_block_mask`.

    first_query: the position of query 0, which only the causal order needs.
    """
    group = checks.group_size("chosen", chosen.shape[1], num_query_heads)
    rows, columns = cells
    chosen = realize(chosen)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        visible = chosen[b, h // group, q_idx // rows, kv_idx // columns]
        if causal:
            visible = visible & (kv_idx <= q_idx + first_query)
        return visible if key_padding_mask is None else visible & key_padding_mask[b, kv_idx]

    return mask_mod


def routed_block_mask(
    chosen: Tensor,
    *,
    num_query_heads: int,
    lengths: tuple[int, int],
    cells: tuple[int, int],
    block_size: int | tuple[int, int] = 128,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
) -> BlockMask:
    """The BlockMask of `routed_mask_mod`, forward and backward.

    chosen: [B, H, cells of queries, cells of keys], bool; query head h reads head h // (num_query_heads / H).
    lengths: (Q, K).  With causal=True the queries are the last Q positions.
    cells: (queries of a cell, keys of a cell); the last cell may be shorter.
    block_size: one int, or (rows of queries, columns of keys), of any ratio to the cells.
    causal: whether a query sees only keys at or before it.  Blocks on the diagonal are then partial.
    key_padding_mask: [B, K], True for real keys.

        cells = (2, 2), causal, chosen = [1 0 0]     keys 0 1 | 2 3 | 4      a block of 2 x 2 is
                                         [0 1 0]     0    x . | . . | .      partial on the diagonal,
                                         [1 0 1]     1    x x | . . | .      full where row 4 sees keys 0 and 1,
                                                     2    . . | x . | .      partial for the short last cell
                                                     3    . . | x x | .
                                                     4    x x | . . | x

    Every visible pair is in a listed block.  O(cells of queries x cells of keys) time and memory per head.
    Raises ValueError or TypeError naming the argument.
    """
    queries, keys = lengths
    for length in lengths:
        checks.positive_int("lengths", length)
    if causal and queries > keys:
        raise ValueError(f"lengths: expected Q of at most K = {keys} with causal=True, got {queries}")
    rows, columns = checks.block_sizes(block_size)
    for size in cells:
        checks.positive_int("cells", size)
    counts = tuple(ceil_div(length, size) for length, size in zip(lengths, cells, strict=True))
    checks.tensor("chosen", chosen, ("B", "H", *counts))
    if chosen.dtype != torch.bool:
        raise TypeError(f"chosen: expected torch.bool, got {chosen.dtype}")
    group = checks.group_size("chosen", chosen.shape[1], num_query_heads)
    first_query = keys - queries if causal else 0

    by_row, cells_of_row = _summed(chosen.int(), -2, queries, rows, cells[0])
    number, cells_of_column = _summed(by_row, -1, keys, columns, cells[1])
    visited = number > 0
    full = number == cells_of_row[:, None] * cells_of_column
    first_row = first_query + rows * torch.arange(visited.shape[-2], device=chosen.device)[:, None]
    first_column = columns * torch.arange(visited.shape[-1], device=chosen.device)
    full = full & (first_column + columns <= keys)
    if causal:
        visited = visited & (first_column < (first_row + rows).clamp(max=keys))
        full = full & (first_column + columns - 1 <= first_row)
    if key_padding_mask is not None:
        checks.padding_mask(key_padding_mask, chosen.shape[0], keys, chosen)
        real, _ = _summed(key_padding_mask[:, None, None].int(), -1, keys, columns, 1)
        visited, full = visited & (real > 0), full & (real == columns)
    full = full & visited
    index = listed_blocks(visited & ~full, full)
    if group > 1:
        index = BlockIndex.of([realize(tensor.repeat_interleave(group, 1)) for tensor in index.tensors()])
    mask_mod = routed_mask_mod(
        chosen, num_query_heads=num_query_heads, cells=cells, causal=causal, first_query=first_query,
        key_padding_mask=key_padding_mask,
    )  # fmt: skip
    return index.block_mask(lengths, (rows, columns), mask_mod)


def top_cells(scores: Tensor, number: int) -> Tensor:
    """[..., C] -> bool [..., C]: the `number` largest scores; of equal scores the last, and never one of -inf."""
    best = by_rank(scores)[..., :number]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & (scores > float("-inf"))


def cell_means(tensor: Tensor, size: int, real: Tensor | None = None) -> Tensor:
    """[B, H, N, D] -> [B, H, cells, D]: the mean over the tokens of a cell, in float32 or better.

    real: [B, N], False for tokens that do not count; a cell of such tokens only has mean 0.
    """
    length = tensor.shape[2]
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    counts = torch.ones(1, length, dtype=wide.dtype, device=tensor.device) if real is None else real.to(wide.dtype)
    if real is not None:
        wide = wide.masked_fill(~real[:, None, :, None], 0.0)  # also a NaN, which 0 * NaN would keep
    beyond = (0, -length % size)
    sums = pad(wide, (0, 0, *beyond)).unflatten(2, (-1, size)).sum(3)
    return sums / pad(counts, beyond).unflatten(1, (-1, size)).sum(2).clamp(min=1)[:, None, :, None]


def _summed(numbers: Tensor, dim: int, length: int, block: int, cell: int) -> tuple[Tensor, Tensor]:
    """Sums along a dimension of cells over the cells that each block of positions touches, and how many those are."""
    start = torch.arange(0, length, block, device=numbers.device)
    first = start // cell
    end = ((start + block).clamp(max=length) - 1) // cell + 1
    numbers = numbers.movedim(dim, -1)
    until = pad(numbers.cumsum(-1, dtype=torch.int32), (1, 0))
    return (until[..., end] - until[..., first]).movedim(-1, dim), end - first
