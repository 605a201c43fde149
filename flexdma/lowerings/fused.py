"""Gather, fused: PyTorch's own CPU attention kernel on each block of queries and its living keys.

The flash kernel (`scaled_dot_product_attention`) takes a float mask: bias - reference where a query sees the key, -inf
elsewhere.  Scores then never leave the cache.  This file cuts a call into blocks, and `fused_blocks.py` computes them.

O(K log K + Q (w + births in a block)) time; memory for one list of living keys per block, and a few masks at a time.
"""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexdma.lifespans import Lifespans
from flexdma.lowerings.fused_blocks import AllKeys, attend_blocks
from flexdma.lowerings.living_keys import living_lists
from flexdma.lowerings.timeline import attend_any_births
from flexdma.rounding import ceil_div
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
    bias: Tensor,
    reference: Tensor,
    lifespans: Lifespans,
    _score_mod: None,
    *,
    capacity: int,
    scale: float,
    block_size: int | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """`fused_attend` for keys born at their own positions; bias [B, Hkv, K], reference [B, Hkv, Q]."""
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
    # Biases of NaN become inf: minimum(NaN, -inf) is NaN, which would reach queries that do not see the key.  inf gives NaN
    # in the softmax of queries that do.
    every_key = AllKeys(
        key.reshape(-1, size),
        value.reshape(-1, size),
        torch.where(bias.isnan(), math.inf, bias).flatten(),
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
            attended = attend_blocks(
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
