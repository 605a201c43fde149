"""Attention of a few blocks of queries, each to its own list of keys, in one call of PyTorch's CPU kernel.

It gathers the living keys and computes the kernel's float mask by arithmetic, which PyTorch vectorises (it does not
vectorise broadcast comparisons and `where`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from flexdma.lowerings.living_keys import LivingList
from flexdma.lowerings.sink_logits import share_of_keys
from flexdma.stages import staged


class AllKeys(NamedTuple):
    """The tensors to gather from, the keys of all heads in one row."""

    key: Tensor  # [B Hkv K, D]
    value: Tensor  # [B Hkv K, Dv]
    bias: Tensor  # [B Hkv K]
    death: Tensor  # [B Hkv K], positions in this row


@staged("key/value gather")
def attend_blocks(
    rows: Tensor,  # [n, G, M, D]
    reference: Tensor,  # [n, M]
    starts: Tensor,  # [n]: positions of the blocks' first queries
    lists: Sequence[LivingList],  # n
    keys: AllKeys,
    scale: float,
    sink: Tensor | None,  # [n, G]
) -> Tensor:
    """Attention of each of n blocks of M queries to the keys of its list -> [n, G, M, D].  A row that sees no key gives 0."""
    index = pad_sequence([each.keys for each in lists], batch_first=True, padding_value=-1)  # [n, C]
    if not index.shape[1]:
        return torch.zeros_like(rows)
    absent = index < 0 if min(len(each.keys) for each in lists) < index.shape[1] else None
    if absent is not None:
        # Fill short lists with the block's first key: its contents, NaN included, reach the block anyway.
        index = torch.where(absent, index[:, :1].clamp(min=0), index)
    key, value, bias, death = (t.index_select(0, index.flatten()).unflatten(0, index.shape) for t in keys)
    if absent is not None:
        bias = bias.masked_fill(absent, -math.inf)
    computed = torch.float64 if rows.dtype == torch.float64 else torch.float32
    mask = (bias.unsqueeze(1) - reference.unsqueeze(2)).to(computed)  # [n, M, C]
    some = slice(max(each.partial for each in lists))
    first, last = (position[:, some] - starts[:, None] for position in (index, death))
    mask[..., some] = torch.minimum(mask[..., some], _bound(first, last, reference.shape[1], computed))

    group = rows.shape[1]
    key, value = (t.to(computed).unsqueeze(1).expand(-1, group, -1, -1) for t in (key, value))
    output = _kernel(rows.to(computed), key, value, mask.unsqueeze(1), scale, sink)
    return output if absent is None else output.masked_fill(absent[:, 0, None, None, None], 0.0)


@staged("attention forward")
def _kernel(rows: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, sink: Tensor | None) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        if sink is None:
            return scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
        # The same kernel under the name that also returns the log-sum-exp, which is 0 for a row that sees no key.
        output, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            rows, key, value, attn_mask=mask, scale=scale
        )
        return output * share_of_keys(log_sum, sink.to(rows.dtype)[..., None])[..., None]


def _bound(birth: Tensor, death: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """[n, C], [n, C], relative to the block's first query -> [n, block, C]: inf where the query sees the key, else -inf.

    birth = [-1 0 1], death = [1 3 2]        query 0:  inf  inf -inf
                                             query 1: -inf  inf  inf
                                             query 2: -inf  inf -inf
    """
    # Clamped, so that floats represent them exactly.
    birth, death = (position.clamp(-1, block + 1).to(dtype).unsqueeze(1) for position in (birth, death))
    # Query i is at i + 0.5, so it never equals a bound: seen <=> |query - centre| < radius.
    query = (torch.arange(block, dtype=dtype) + 0.5)[:, None]
    return (query - (birth + death) / 2).abs_().sub_((death - birth) / 2).mul_(-math.inf)
