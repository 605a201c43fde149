"""Attention of blocks of queries, each to the keys gathered for it, by PyTorch's CPU kernel and a mask, in a traced form.

`fused_blocks.py` runs the same kernel on ragged lists, which need Python.  Programs of torch.export get this form: all blocks
have the same number of keys C, and one call computes them all.  Memory beyond the gathered keys: a mask of Q C numbers per KV
head; scores never leave the cache.
"""

import torch
from torch import Tensor

from flexdma.lowerings.float_mask import seen_bound, without_nan
from flexdma.lowerings.plain_blocks import Blocks, joined, parted
from flexdma.mixed_precision import without_autocast


def attend_masked_blocks(
    keys: Tensor,  # [B, Hkv, R, C, D]
    values: Tensor,  # [B, Hkv, R, C, D]
    blocks: Blocks,
    *,
    scale: float,
    log_sum: bool,
) -> list[Tensor]:
    """`plain_blocks.attend_blocks` without a score_mod and without a gradient."""
    rows, bias, reference, slots, death, positions = blocks
    leading, group = rows.shape[:3], rows.shape[3]
    computed = torch.float64 if rows.dtype == torch.float64 else torch.float32
    start = positions[..., :1]
    difference = (without_nan(bias).unsqueeze(-2) - reference.unsqueeze(-1)).to(computed)  # [B, Hkv, R, M, C]
    mask = torch.minimum(difference, seen_bound(slots - start, death - start, rows.shape[4], computed))
    with without_autocast(rows.device):
        query, key, value = (joined(tensor.to(computed)) for tensor in (rows, keys, values))
        key, value = (tensor.unsqueeze(1).expand(-1, group, -1, -1) for tensor in (key, value))
        # The name under which PyTorch's kernel also returns the log-sum-exp, which is 0 for a row that sees no key.
        output, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=joined(mask).unsqueeze(1), scale=scale
        )
    output = parted(output, leading).to(rows.dtype)
    return [output, parted(total, leading)] if log_sum else [output]
