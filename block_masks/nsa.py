"""NSA's selection branch: blocks of keys chosen by the attention to compressed keys.

Yuan et al., "Native Sparse Attention", arXiv 2502.11089, section 3.3.2.  The compression and the window are other branches,
which the model adds with its own gates.  For reference: each query chooses alone, so a row block of FlexAttention visits
the union of its rows' choices, which NSA's own kernel avoids by one row block per query (docs/systems/recipes.md).
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from flexdma import checks
from flexdma.block_masks.routed import routed_block_mask, top_cells
from flexdma.rounding import ceil_div


def nsa_selection(
    query: Tensor,
    compressed_key: Tensor,
    *,
    num_keys: int,
    compressed_size: int = 32,
    stride: int = 16,
    selected_size: int = 64,
    top_n: int = 16,
    initial: int = 1,
    local: int = 2,
    scale: float | None = None,
) -> Tensor:
    """Which blocks of keys each query selects, one choice for the query heads of a KV head.

    query: [B, Hq, Q, D], the last Q of num_keys positions.
    compressed_key: [B, Hkv, Cc, D], Cc = (num_keys - compressed_size) // stride + 1 (0 for fewer keys); number c is the
        model's summary of keys c stride .. c stride + compressed_size - 1.
    selected_size, top_n: keys of a selected block, and how many blocks a query selects.  `initial` first and `local` last
        blocks are always among them.
    scale: of the scores of compressed keys; None = D ** -0.5.

    The importance of a block is the attention to compressed keys, times the strides that they share with the block, summed
    over the heads of a group (equations 9 and 10).  Only summaries of keys at or before the query count; of equal
    importance the newer block is taken.

        compressed_size = 4, stride = 2, selected_size = 4       keys 0 1 2 3 | 4 5 6 7
        c = 0 is keys 0-3: 2 strides of block 0                       0 0 0 0
        c = 1 is keys 2-5: 1 stride of each block                         1 1   1 1

    Returns [B, Hkv, Q, ceil(num_keys / selected_size)], bool, without a gradient; a query selects no block after its own.
    O(Q num_keys / stride) time and memory per query head.  Raises ValueError or TypeError naming the argument.
    """
    for name, size in (("compressed_size", compressed_size), ("stride", stride), ("selected_size", selected_size)):
        checks.positive_int(name, size)
    checks.positive_int("top_n", top_n)
    checks.positive_int("initial", initial, 0)
    checks.positive_int("local", local, 1)
    for name, size in (("compressed_size", compressed_size), ("selected_size", selected_size)):
        if size % stride:
            raise ValueError(f"{name}: expected a multiple of stride = {stride}, got {size}")
    if initial + local > top_n:
        raise ValueError(f"top_n: expected at least initial + local = {initial + local}, got {top_n}")
    batch, query_heads, queries, size = checks.tensor("query", query, ("B", "Hq", "Q", "D")).shape
    checks.positive_int("num_keys", num_keys, queries)
    summaries = max(0, (num_keys - compressed_size) // stride + 1)
    heads = checks.tensor("compressed_key", compressed_key, (batch, "Hkv", summaries, size), query).shape[1]
    group = checks.group_size("compressed_key", heads, query_heads)

    device, wide = query.device, torch.promote_types(query.dtype, torch.float32)
    position = torch.arange(num_keys - queries, num_keys, device=device)[:, None]
    scores = query.detach().to(wide).unflatten(1, (heads, group)) @ compressed_key.detach().to(wide).mT.unsqueeze(2)
    scores = scores * (size**-0.5 if scale is None else scale)
    end = stride * torch.arange(summaries, device=device) + compressed_size - 1
    seen = end <= position
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen, 0.0)

    # Column u of `strides`: the attention to compressed keys that contain stride u.
    strides = torch.zeros(
        *weights.shape[:-1], ceil_div(num_keys, selected_size) * (selected_size // stride), device=device, dtype=wide
    )
    for shift in range(compressed_size // stride):
        strides = strides + pad(weights, (shift, strides.shape[-1] - summaries - shift))
    importance = strides.unflatten(-1, (-1, selected_size // stride)).sum(-1).sum(2)  # [B, Hkv, Q, C]

    block, own = torch.arange(importance.shape[-1], device=device), position // selected_size
    fixed = (block < initial) | (own - block < local)
    importance = importance.masked_fill(fixed, float("inf")).masked_fill(block > own, float("-inf"))
    return top_cells(importance, top_n)


def nsa_block_mask(
    chosen: Tensor,
    *,
    num_query_heads: int,
    num_keys: int,
    selected_size: int = 64,
    block_size: int | tuple[int, int] = 128,
) -> BlockMask:
    """The mask of the selection branch, causal: a query sees the keys at or before it in the blocks that it selects.

    chosen: [B, Hkv, Q, C], of `nsa_selection`.
    Raises ValueError or TypeError naming the argument.
    """
    checks.tensor("chosen", chosen, ("B", "Hkv", "Q", "C"))
    return routed_block_mask(
        chosen, num_query_heads=num_query_heads, lengths=(chosen.shape[2], num_keys), cells=(1, selected_size),
        block_size=block_size,
    )  # fmt: skip
