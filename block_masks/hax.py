"""HAX's hash buckets: a query attends to the most recent keys of its own bucket.

Zhan et al., "Overcoming Long-Context Limitations of State-Space Models via Context-Dependent Sparse Attention",
arXiv 2507.00449.  HAX adds key selection, which is `flexdma.policies.hax_lifespans`.

The buckets are lifespans once queries and keys are sorted by (bucket, position): the keys that a query sees are a run, and
both ends of the run move forward from one sorted query to the next.  So each key is visible to one run of queries.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexdma import checks
from flexdma.block_masks.lifespan import lifespan_block_mask
from flexdma.lifespans import Lifespans
from flexdma.opaque import realize


class HaxMask(NamedTuple):
    """The mask between sorted queries and sorted keys.

    query_order: [B, Hq, Q], key_order: [B, Hkv, K], int64: the position of each sorted query and key.
    lifespans: [B, Hq, K], int32: the sorted queries that see each sorted key, counted from K - Q.
    block_mask: of `lifespan_block_mask`, [B, Hq, Q, K].
    """

    query_order: Tensor
    key_order: Tensor
    lifespans: Lifespans
    block_mask: BlockMask


def hax_buckets(vectors: Tensor, directions: Tensor) -> Tensor:
    """The bucket of each query or key: the direction with the largest product.

    vectors: [B, H, N, D].  directions: [D, buckets], random, the same for queries and keys.
    The published code first subtracts the mean over the sequence from queries and keys, which reads later tokens; do that
    before the call if you need it.  Returns [B, H, N], int64.  Of equal products one is taken.
    """
    checks.tensor("vectors", vectors, ("B", "H", "N", "D"))
    checks.tensor("directions", directions, (vectors.shape[-1], "buckets"), vectors)
    return (vectors.detach() @ directions.to(vectors.dtype)).argmax(-1)


def hax_block_mask(
    query_buckets: Tensor,
    key_buckets: Tensor,
    *,
    window_size: int | None = None,
    block_size: int | tuple[int, int] = 128,
) -> HaxMask:
    """The mask under which a query sees the last `window_size` keys of its bucket at or before it.

    query_buckets: [B, Hq, Q], integers, of the last Q positions.  key_buckets: [B, Hkv, K].
    window_size: None = all keys of the bucket before the query.
    Documents: number the buckets of each document apart.  Padding: give padded keys a bucket that no query has.

        buckets 0 1 0 0 1 (queries and keys), window_size = 2       key    0 2 3 | 1 4
            query_order = key_order = [0 2 3 1 4]              query 0     x . . | . .
            lifespans.birth = [0 1 2 3 4]                            2     x x . | . .
            lifespans.death = [2 3 3 5 5]                            3     . x x | . .
                                                                     1     . . . | x .
                                                                     4     . . . | x x

    Sort queries, keys and values by `tensor.take_along_dim(order[..., None], 2)`, and undo it with `query_order.argsort(-1)`.
    A query without a key in its bucket gives 0.  O(N log N) time, O(N) memory and 4 ints per pair of blocks.
    Raises ValueError or TypeError naming the argument.
    """
    batch, query_heads, queries = checks.tensor("query_buckets", query_buckets, ("B", "Hq", "Q")).shape
    heads, keys = checks.tensor("key_buckets", key_buckets, (batch, "Hkv", "K"), query_buckets).shape[1:]
    for name, buckets in (("query_buckets", query_buckets), ("key_buckets", key_buckets)):
        if buckets.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name}: expected torch.int32 or torch.int64, got {buckets.dtype}")
    group = checks.group_size("key_buckets", heads, query_heads)
    if queries > keys:
        raise ValueError(f"query_buckets: expected at most K = {keys} queries (they are the last ones), got {queries}")
    if window_size is not None:
        checks.positive_int("window_size", window_size)

    # One number for bucket and position, in the order of both.
    position = torch.arange(keys, device=key_buckets.device)
    sorted_keys, key_order = (key_buckets.long() * keys + position).sort(-1)
    sorted_queries, query_order = (query_buckets.long() * keys + position[keys - queries :]).sort(-1)
    places = sorted_keys.repeat_interleave(group, 1)
    # A query sees the sorted keys first .. end - 1.
    end = torch.searchsorted(places, sorted_queries, right=True)
    first = torch.searchsorted(places, sorted_queries // keys * keys)
    if window_size is not None:
        first = torch.maximum(first, end - window_size)
    place = position.expand(batch, query_heads, keys).contiguous()
    bounds = [torch.searchsorted(ends, place, right=True) + keys - queries for ends in (end, first)]
    lifespans = Lifespans(*(realize(bound.int()) for bound in bounds))  # buffers, which a compiled mask_mod can capture
    block_mask = lifespan_block_mask(lifespans, num_query_heads=query_heads, num_queries=queries, block_size=block_size)
    return HaxMask(query_order, key_order, lifespans, block_mask)
