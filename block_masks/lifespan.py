"""Lifespans as a mask_mod, and the BlockMask that accelerates it.

The mask_mod defines the mask.  The block metadata list the blocks to skip (empty) and the blocks to visit without the
mask (full).  Two histograms per key block give them, and no Q x K tensor exists (DMA, arXiv 2508.02124; empty and full
blocks are FlexAttention's idea, arXiv 2412.05496).
"""

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexdma import checks
from flexdma.lifespans import Lifespans
from flexdma.opaque import realize
from flexdma.packing.block_index import BlockIndex, block_index
from flexdma.packing.rows import FoldedRows
from flexdma.signatures import MaskMod


def lifespan_mask_mod(lifespans: Lifespans, *, num_query_heads: int, first_query: int = 0) -> MaskMod:
    """True where birth[key] <= position of the query < death[key].

    lifespans: birth and death [B, H, K].
    num_query_heads: Hq; query head h reads the lifespans of head h // (Hq / H).  See `gate_score_mod`.
    first_query: the position of query 0; K - Q where the queries are the last Q positions.
    """
    birth, death = lifespans
    group = checks.group_size("lifespans", birth.shape[1], num_query_heads)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        position = q_idx + first_query
        return (position >= birth[b, h // group, kv_idx]) & (position < death[b, h // group, kv_idx])

    return mask_mod


def lifespan_block_mask(
    lifespans: Lifespans,
    *,
    num_query_heads: int,
    num_queries: int | None = None,
    block_size: int | tuple[int, int] = 128,
) -> BlockMask:
    """The BlockMask of `lifespan_mask_mod`, for the last `num_queries` positions (default: all K), forward and backward.

    lifespans: birth and death [B, H, K], keys in any order.
    block_size: one int, or (rows of queries, columns of keys).
    Returns a BlockMask of [B, Hq, Q, K].  4 ints per pair of blocks and head; no Q x K tensor exists.
    Raises ValueError where H does not divide num_query_heads or num_queries > K.
    """
    birth = checks.tensor("lifespans.birth", lifespans.birth, ("B", "H", "K"))
    heads, keys = birth.shape[1:]
    checks.tensor("lifespans.death", lifespans.death, birth.shape, birth)
    group = checks.group_size("lifespans", heads, num_query_heads)
    queries = keys if num_queries is None else num_queries
    checks.positive_int("num_queries", queries)
    if queries > keys:
        raise ValueError(f"num_queries: expected at most K = {keys}, got {queries}")
    rows, columns = checks.block_sizes(block_size)

    birth, death = (bound - (keys - queries) for bound in lifespans)
    own = FoldedRows(queries, group=1)
    index = block_index(birth, death, rows=own, block_size=(rows, columns), transposed=True)
    # Contiguous copies per query head: the kernel reads rows in memory order, and reads an expanded view silently wrong.
    if group > 1:
        index = BlockIndex.of([realize(tensor.repeat_interleave(group, 1)) for tensor in index.tensors()])
    mask_mod = lifespan_mask_mod(lifespans, num_query_heads=num_query_heads, first_query=keys - queries)
    return index.block_mask((queries, keys), (rows, columns), mask_mod)
