"""Gather, fused: PyTorch's own CPU attention kernel on each block of queries and its living keys.

The flash kernel (`scaled_dot_product_attention`) takes a float mask: gate - reference where a query sees the key, -inf
elsewhere.  Scores then never leave the cache.  Per block this code gathers the living keys and computes that mask by
arithmetic, which PyTorch vectorises (it does not vectorise broadcast comparisons and `where`).

O(K log K + Q (w + births in a block)) time; memory for one list of living keys per block, and a few masks at a time.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence

from flexdma.lifespans import Lifespans
from flexdma.lowerings.living_keys import LivingList, living_lists
from flexdma.lowerings.sink_logits import share_of_keys
from flexdma.lowerings.timeline import attend_any_births
from flexdma.rounding import ceil_div
from flexdma.stages import staged
from flexdma.transforms import is_recorded, is_transformed, needs_gradient

# Queries per block.  From 192 rows on the kernel multiplies 64 at a time, from 768 on 256, and rereads keys less often.
BLOCK_SIZE, LARGE_BLOCK = 256, 1024
# A large block pays while its own births add less than this share to the keys that a query sees.
FEW_BIRTHS = 1 / 4
# Scores per kernel call and thread: enough work for every thread, with a mask that stays in cache.
SCORES_PER_THREAD = 2**20


def is_fusible(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, sink_logits: Tensor | None) -> bool:
    """Whether `fused_attend` can compute this call: on a CPU, without derivatives, with D = Dv."""
    needs_derivative = needs_gradient(query, key, value, bias, sink_logits) or is_transformed()
    return query.device.type == "cpu" and not needs_derivative and query.shape[-1] == value.shape[-1]


def block_size_for(lifespans: Lifespans, queries: int, capacity: int) -> int:
    """Queries per block: a large block where there are many queries and few keys are born in a block."""
    if queries < 8 * LARGE_BLOCK:
        return BLOCK_SIZE
    births = (lifespans.death > lifespans.birth).float().mean().item() * LARGE_BLOCK
    return LARGE_BLOCK if births <= FEW_BIRTHS * capacity else BLOCK_SIZE


def fused_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    lifespans: Lifespans,
    *,
    in_order: bool | None,
    ranked: bool,
    capacity: int,
    scale: float,
    block_size: int | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """`gather_attend` without a score_mod, where `is_fusible`.  For tracers and fake tensors it is one opaque operator.

    It cannot be traced, because its lists are ragged.
    """
    attend = _operator if torch.compiler.is_compiling() or is_recorded(query) else _fused_attend
    return attend(
        query,
        key,
        value,
        bias,
        lifespans.birth,
        lifespans.death,
        in_order,
        ranked,
        capacity,
        scale,
        block_size,
        sink_logits,
    )


def _fused_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    birth: Tensor,
    death: Tensor,
    in_order: bool | None,
    ranked: bool,
    capacity: int,
    scale: float,
    block_size: int | None,
    sink_logits: Tensor | None,
) -> Tensor:
    attend = partial(_attend_in_order, capacity=capacity, scale=scale, block_size=block_size, sink_logits=sink_logits)
    return attend_any_births(
        attend, query, key, value, bias, Lifespans(birth, death), in_order=in_order, ranked=ranked,
        exact=sink_logits is not None, score_mod=None, reads_device=True,
    )  # fmt: skip


_operator = torch.library.custom_op("flexdma::attend_living_keys", _fused_attend, mutates_args=())
_operator.register_fake(lambda query, *others: torch.empty_like(query, memory_format=torch.contiguous_format))


def _attend_in_order(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    reference: Tensor,
    lifespans: Lifespans,
    _score_mod: None,
    *,
    capacity: int,
    scale: float,
    block_size: int | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """`fused_attend` for keys born at their own positions; gate [B, Hkv, K], reference [B, Hkv, Q]."""
    batch, query_heads, queries, size = query.shape
    heads, keys = key.shape[1:3]
    group, block = query_heads // heads, min(block_size or block_size_for(lifespans, queries, capacity), queries)
    blocks = ceil_div(queries, block)
    beyond = blocks * block - queries

    reference = pad(reference, (0, beyond)).view(-1, blocks, block)  # [B Hkv, R, M]
    birth, death = (bound.expand(batch, heads, keys).contiguous() for bound in lifespans)
    lists = living_lists(birth, death, queries, capacity, block)
    # From here on the keys of all heads are in one row, [B Hkv K].
    head_starts = keys * torch.arange(batch * heads)[:, None]
    block_starts = head_starts + torch.arange(keys - queries, keys + beyond, block)  # [B Hkv, R]
    # Gates of NaN become inf: minimum(NaN, -inf) is NaN, which would reach queries that do not see the key.  inf gives NaN
    # in the softmax of queries that do.
    every_key = _Keys(
        key.reshape(-1, size),
        value.reshape(-1, size),
        torch.where(gate.isnan(), math.inf, gate).flatten(),
        (death.flatten(0, 1) + head_starts).flatten(),
    )
    if beyond:
        query = pad(query, (0, 0, 0, beyond))
    rows = query.unflatten(2, (blocks, block)).unflatten(1, (heads, group)).flatten(0, 1)  # [B Hkv, G, R, M, D]
    output = torch.empty_like(rows, memory_format=torch.contiguous_format)
    sinks = None if sink_logits is None else sink_logits.view(heads, 1, group).repeat(batch, blocks, 1)  # [B Hkv, R, G]

    most = max(1, torch.get_num_threads() * SCORES_PER_THREAD // (group * block * (capacity + block)))
    step = max(1, most // blocks)  # heads at a time, if one call fits all their blocks
    for h in range(0, batch * heads, step):
        for r in range(0, blocks, most):
            some = (slice(h, h + step), slice(r, r + most))
            some_rows = rows.transpose(1, 2)[some]
            some_lists = [each for head in lists[some[0]] for each in head[some[1]]]
            attended = _attend(
                some_rows.flatten(0, 1),
                reference[some].flatten(0, 1),
                block_starts[some].flatten(),
                some_lists,
                every_key,
                scale,
                None if sinks is None else sinks[some].flatten(0, 1),
            )
            output.transpose(1, 2)[some] = attended.view_as(some_rows)
    return output.view(batch, query_heads, blocks * block, size)[:, :, :queries].contiguous()


class _Keys(NamedTuple):
    """The tensors to gather from, the keys of all heads in one row."""

    key: Tensor  # [B Hkv K, D]
    value: Tensor  # [B Hkv K, Dv]
    gate: Tensor  # [B Hkv K]
    death: Tensor  # [B Hkv K], positions in this row


@staged("key/value gather")
def _attend(
    rows: Tensor,  # [n, G, M, D]
    reference: Tensor,  # [n, M]
    starts: Tensor,  # [n]: positions of the blocks' first queries
    lists: Sequence[LivingList],  # n
    keys: _Keys,
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
    key, value, gate, death = (t.index_select(0, index.flatten()).unflatten(0, index.shape) for t in keys)
    if absent is not None:
        gate = gate.masked_fill(absent, -math.inf)
    computed = torch.float64 if rows.dtype == torch.float64 else torch.float32
    mask = (gate.unsqueeze(1) - reference.unsqueeze(2)).to(computed)  # [n, M, C]
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
