"""MoBA: each query attends to its own chunk of keys, and to the chunks whose mean key has the largest product with it.

Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexdma import checks
from flexdma.block_masks.routed import cell_means, routed_block_mask, top_cells
from flexdma.rounding import ceil_div


def moba_block_mask(
    query: Tensor,
    key: Tensor,
    *,
    chunk_size: int,
    top_k: int,
    block_size: int | tuple[int, int] = 128,
    key_padding_mask: Tensor | None = None,
) -> BlockMask:
    """The mask under which a query sees its own chunk, causally, and the top_k - 1 best earlier chunks.

    query: [B, Hq, Q, D], the last Q positions.  key: [B, Hkv, K, D].
    chunk_size: keys of a chunk.  A chunk's score is query . mean(its keys), by query head; of equal scores the newer.
    key_padding_mask: [B, K], True for real keys.  Only these count in a mean, and chunks start at position 0 of the row, so
        padding on the right changes nothing, and padding on the left shifts the chunks.

        chunk_size = 2, top_k = 2      keys 0 1 | 2 3 | 4 5
                                 query 3    x x | x x |          its own chunk, and the only earlier one
                                 query 4    . . | x x | x .      chunk 1 scores better than chunk 0

    Scores have no gradient; attention trains queries and keys, and so the choice.
    Each query chooses alone, and a row block visits the union of its rows' choices.
    O(Q K / chunk_size) time and memory per query head.  Raises ValueError or TypeError naming the argument.
    """
    checks.attention_arguments(query, key, key)
    checks.positive_int("chunk_size", chunk_size)
    checks.positive_int("top_k", top_k)
    batch, query_heads, queries, _size = query.shape
    heads, keys = key.shape[1:3]
    if key_padding_mask is not None:
        checks.padding_mask(key_padding_mask, batch, keys, key)

    means = cell_means(key.detach(), chunk_size, key_padding_mask)  # [B, Hkv, C, D]
    rows = query.detach().to(means.dtype).unflatten(1, (heads, -1))
    scores = (rows @ means.mT.unsqueeze(2)).flatten(1, 2)  # [B, Hq, Q, C]
    chunk = torch.arange(ceil_div(keys, chunk_size), device=key.device)
    own = (torch.arange(keys - queries, keys, device=key.device) // chunk_size)[:, None]
    if key_padding_mask is not None:
        # A chunk without a real key takes no place among the top_k.
        real = torch.zeros(batch, chunk.numel(), dtype=torch.int32, device=key.device)
        real = real.index_add(1, torch.arange(keys, device=key.device) // chunk_size, key_padding_mask.int())
        scores = scores.masked_fill((real == 0)[:, None, None], float("-inf"))
    scores = scores.masked_fill(chunk > own, float("-inf")).masked_fill(chunk == own, float("inf"))
    return routed_block_mask(
        top_cells(scores, top_k), num_query_heads=query_heads, lengths=(queries, keys), cells=(1, chunk_size),
        block_size=block_size, key_padding_mask=key_padding_mask,
    )  # fmt: skip
