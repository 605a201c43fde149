"""BiFormer: each region of an image attends to the regions whose mean key has the largest product with its mean query.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv 2303.08810.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexdma import checks
from flexdma.block_masks.routed import cell_means, routed_block_mask, top_cells


def biformer_order(grid: tuple[int, int], regions: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """Positions [height * width] of an image in raster order, sorted by region: tokens of one region become neighbours.

    grid: (height, width) in tokens.  regions: how many (down, across), divisors of the grid.

        grid = (2, 4), regions = (1, 2)      0 1 | 2 3
                                             4 5 | 6 7      order = [0 1 4 5  2 3 6 7]

    `tensor[:, :, order]` sorts tokens, `output[:, :, order.argsort()]` undoes it.
    Raises ValueError where the regions do not divide the grid.
    """
    (height, width), (down, across) = grid, regions
    for count in (*grid, *regions):
        checks.positive_int("grid and regions", count)
    if height % down or width % across:
        raise ValueError(f"grid: expected multiples of regions = {(down, across)}, got {(height, width)}")
    positions = torch.arange(height * width, device=device).view(down, height // down, across, width // across)
    return positions.transpose(1, 2).flatten()


def biformer_block_mask(
    query: Tensor, key: Tensor, *, num_regions: int, top_k: int, block_size: int | tuple[int, int] = 128
) -> BlockMask:
    """The mask under which the tokens of a region see all tokens of its top_k regions, in both directions.

    query, key: [B, Hq, N, D] and [B, Hkv, N, D], in the order of `biformer_order`; num_regions divides N.
    The score of a region is mean query . mean key, summed over heads: all heads share the choice, as in the paper.  Of equal
    scores the later region is taken.

        regions a b c d, top_k = 2, a chooses a and c: its tokens see   a . c .

    The choice has no gradient; attention trains queries and keys.  O(N D + num_regions²) time, O(num_regions²) memory.
    Raises ValueError or TypeError naming the argument.
    """
    checks.attention_arguments(query, key, key)
    checks.positive_int("num_regions", num_regions)
    checks.positive_int("top_k", top_k)
    (_batch, query_heads, length, _size), heads = query.shape, key.shape[1]
    if key.shape[2] != length:
        raise ValueError(f"key: expected {length} tokens as query has, got {key.shape[2]}")
    if length % num_regions:
        raise ValueError(f"num_regions: expected a divisor of {length} tokens, got {num_regions}")
    size = length // num_regions
    region_query, region_key = (cell_means(tensor.detach(), size) for tensor in (query, key))
    # The heads of a group have one key, so their mean queries add up.
    region_query = region_query.unflatten(1, (heads, -1)).sum(2)
    scores = (region_query @ region_key.mT).sum(1, keepdim=True)  # [B, 1, regions, regions]
    return routed_block_mask(
        top_cells(scores, top_k), num_query_heads=query_heads, lengths=(length, length), cells=(size, size),
        block_size=block_size, causal=False,
    )  # fmt: skip
