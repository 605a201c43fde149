"""Attention of one query per head by PyTorch's CPU kernel, whose rows are the query heads of a KV head."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention_of_one(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """[B, Hq, 1, Dv], in query's dtype, for query [B, Hq, 1, D], key [B, Hkv, C, D], value [B, Hkv, C, Dv].

    bias: [B, Hkv, 1, C], float32 or float64, -inf for keys that are not visible; each row sees a key.
    """
    batch, heads = key.shape[:2]
    query_heads, size = query.shape[1], query.shape[3]
    rows = query.reshape(batch, heads, query_heads // heads, size)
    computed = torch.float64 if query.dtype == torch.float64 else torch.float32
    if bias.dtype != computed or rows.dtype != computed:
        bias, rows, key, value = (tensor.to(computed) for tensor in (bias, rows, key, value))
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            output = scaled_dot_product_attention(rows, key, value, attn_mask=bias, scale=scale)
    else:
        output = scaled_dot_product_attention(rows, key, value, attn_mask=bias, scale=scale)
    output = output.reshape(batch, query_heads, 1, value.shape[3])
    return output if output.dtype == query.dtype else output.to(query.dtype)
