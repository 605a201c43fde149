"""From gates to the BlockMask of Dynamic Mask Attention (arXiv 2508.02124) in one call, keys in their natural order."""

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexdma.block_masks.lifespan import lifespan_block_mask
from flexdma.lifespans import causal_top_w


def dynamic_block_mask(gate: Tensor, window_size: int, *, num_query_heads: int, block_size: int = 128) -> BlockMask:
    """The mask under which each query sees the `window_size` best-gated keys at or before it.

    gate: [B, H, K]; query head h reads gate head h // (num_query_heads / H).
    For sinks, recent keys, padding or documents call `flexdma.causal_top_w`, then `lifespan_block_mask`.

    The mask is exact, but with keys in their natural order few blocks are empty, so FlexAttention skips little.
    `flexdma.dynamic_mask_attention` packs the keys first and skips more.  O(K log K) time, 4 ints per pair of blocks.
    """
    lifespans = causal_top_w(gate, window_size)
    return lifespan_block_mask(lifespans, num_query_heads=num_query_heads, block_size=block_size)
