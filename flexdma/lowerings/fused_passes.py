"""The forward and the backward of the fused gather: loops over the chunks of a call.

All functions take a query [B, Hq, Q, D], key and value [B, Hkv, K, D], bias [B, Hkv, P K], reference [B, Hkv, Q], and
lifespans [B, H, P K]; in_order as in `fused_cut.Cut`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexdma.lifespans import Lifespans
from flexdma.lifespans.visible import seen_by_queries
from flexdma.lowerings.fused_blocks import attend_blocks, block_gradients
from flexdma.lowerings.fused_cut import Cut
from flexdma.mixed_precision import without_autocast

# A difference of biases from which on the backward computes in float64.
SATURATED = 1024.0


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    reference: Tensor,
    birth: Tensor,
    death: Tensor,
    capacity: int,
    scale: float,
    block_size: int | None,
    in_order: bool | None,
) -> tuple[Tensor, Tensor]:
    lifespans = Lifespans(birth, death)
    output, log_sum = empty_output(query)
    cut = Cut(query, key, value, bias, reference, lifespans, capacity, block_size, in_order, log_sum.dtype)
    by_head = [cut.by_head(tensor) for tensor in (query, output, log_sum)]
    with without_autocast(query.device):
        for strip in cut.strips():
            rows, *outputs = map(strip.blocks, by_head)
            for where, keys in strip.chunks:
                if keys is None:
                    _fill(outputs, where, None)
                else:
                    _fill(outputs, where, attend_blocks(rows[where].flatten(0, 1), keys, scale))
    return output, log_sum


def _fill(tensors: Sequence[Tensor], where: tuple[slice, slice], rows: Sequence[Tensor] | None) -> None:
    """Write rows [n, G, M, ...], None for zeros, to each of the tensors of `Strip.blocks`."""
    for number, tensor in enumerate(tensors):
        some = tensor[where]
        if rows is None:
            some.zero_()
        else:
            some.copy_(rows[number].view(some.shape))


def empty_output(query: Tensor, *_others: Any) -> tuple[Tensor, Tensor]:
    log_sum = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))
    return torch.empty_like(query, memory_format=torch.contiguous_format), log_sum


def gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    reference: Tensor,
    birth: Tensor,
    death: Tensor,
    output: Tensor,
    log_sum: Tensor,
    output_gradient: Tensor,
    log_sum_gradient: Tensor | None,
    capacity: int,
    scale: float,
    block_size: int | None,
    in_order: bool | None,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias; zeros for a bias that needs none."""
    lifespans = Lifespans(birth, death)
    computed = torch.float64 if saturates(bias, reference, lifespans) else log_sum.dtype
    cut = Cut(query, key, value, bias, reference, lifespans, capacity, block_size, in_order, computed)
    of_query, of_key, of_value, of_bias = _empty_gradients(query, key, value, bias)
    by_head = [cut.by_head(tensor) for tensor in (of_query, query, output, log_sum, output_gradient)]
    if log_sum_gradient is not None:
        by_head.append(cut.by_head(log_sum_gradient))
    to_key, to_value, to_bias = of_key.flatten(0, 2), of_value.flatten(0, 2), of_bias.flatten()
    with without_autocast(query.device):
        for strip in cut.strips():
            to_rows, *rows = map(strip.blocks, by_head)
            for where, keys in strip.chunks:
                if keys is None:
                    _fill([to_rows], where, None)
                    continue
                some = [tensor[where].flatten(0, 1) for tensor in rows]
                of = block_gradients(*some, keys=keys, scale=scale, needs_bias=needs_bias)
                _fill([to_rows], where, [of.rows])
                index = keys.position.flatten()
                to_key.index_add_(0, index, of.key.flatten(0, 1).to(to_key.dtype))
                to_value.index_add_(0, index, of.value.flatten(0, 1).to(to_value.dtype))
                if of.bias is not None:
                    to_bias.index_add_(0, keys.term.flatten(), of.bias.flatten().to(to_bias.dtype))
    return of_query, of_key.to(key.dtype), of_value.to(value.dtype), of_bias.to(bias.dtype)


def _empty_gradients(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of query in its dtype; of key, value and bias as sums in float32 or float64."""
    query, *keys = inputs
    computed = torch.promote_types(query.dtype, torch.float32)
    of_key, of_value, of_bias = (tensor.new_zeros(tensor.shape, dtype=computed) for tensor in keys)
    return torch.empty_like(query, memory_format=torch.contiguous_format), of_key, of_value, of_bias


def saturates(bias: Tensor, reference: Tensor, lifespans: Lifespans) -> bool:
    """Whether the bias of a visible key is so far below the best one at its birth that softmaxes are 1 for one key.

    The gradient of a score is P_ij (dO_i . v_j - D_i), whose terms are equal where P_ij = 1.  The kernel computes them in
    two ways, which differ by a rounding.  A gate that is an exponential multiplies the difference by its size.
    """
    queries = reference.shape[-1]
    born, dies = (bound.expand(bias.shape) for bound in seen_by_queries(lifespans, queries))
    below = reference.gather(-1, born.clamp(max=queries - 1).long()) - bias
    seen = (dies > born) & below.isfinite()
    return bool((torch.where(seen, below, 0.0) > SATURATED).any())


def empty_like_inputs(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in arguments[:4])
