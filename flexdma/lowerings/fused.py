"""Gather, fused: PyTorch's own CPU attention kernel on each block of queries and its living keys.

The flash kernel takes a float mask: bias - reference where a query sees the key, -inf elsewhere.  Scores then never leave
the cache, in the forward and in the backward.  `fused_cut.py` cuts a call into chunks, `fused_blocks.py` computes one chunk,
and `fused_passes.py` loops over them.  This file makes two operators of it: a forward that also returns the log-sum-exp, and
its backward, which recomputes the scores from it.

Births may come at any query, and keys may have several intervals: the operators read them, compiled or not.

O(P K log P K + Q (w + births in a block)) time; memory for one list of living keys per block, and a few masks at a time.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from flexdma.lifespans import Lifespans
from flexdma.lowerings.fused_passes import attend, empty_like_inputs, empty_output, gradients
from flexdma.lowerings.timeline import attend_any_births
from flexdma.opaque import joined_batches
from flexdma.transforms import is_recorded, is_transformed, needs_gradient


def is_fusible(query: Tensor, value: Tensor, scale: float) -> bool:
    """Whether `fused_attend` can compute this call: on a CPU, outside of torch.func and forward-mode AD, with D = Dv.

    The backward divides by the scale, so it must not be 0.
    """
    same_size = query.shape[-1] == value.shape[-1]
    return query.device.type == "cpu" and not is_transformed() and same_size and scale != 0


def fused_attend(
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
    in_order: bool | None,
) -> tuple[Tensor, Tensor]:
    """As `attend_any_births`, without a score_mod: attention and the log-sum-exp.  A row that sees no key gives 0 and 0.

    With gradients, for tracers and for fake tensors it is one opaque operator.  It cannot be traced: its lists are ragged.
    """
    opaque = torch.compiler.is_compiling() or is_recorded(query) or needs_gradient(query, key, value, bias)
    return (_operator if opaque else attend)(
        query, key, value, bias, reference, *lifespans, capacity, scale, block_size, in_order
    )


_operator = torch.library.custom_op("flexdma::attend_blocks", attend, mutates_args=())
_operator.register_fake(empty_output)
_backward = torch.library.custom_op("flexdma::attend_blocks_backward", gradients, mutates_args=())
_backward.register_fake(empty_like_inputs)
# torch.autograd.grad(..., is_grads_batched=True) maps the backward over gradients.
_backward.register_vmap(partial(joined_batches, _backward))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.options = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, output_gradient: Tensor | None, log_sum_gradient: Tensor | None) -> tuple[Any, ...]:
    """The backward of `_operator`; with create_graph=True that of plain operations, which is differentiable again."""
    *inputs, output, log_sum = ctx.saved_tensors
    needed = ctx.needs_input_grad
    if output_gradient is None:
        output_gradient = torch.zeros_like(output)
    if torch.is_grad_enabled():
        found = _twice_differentiable(inputs, needed, output_gradient, log_sum_gradient, *ctx.options)
    else:
        found = _backward(*inputs, output, log_sum, output_gradient, log_sum_gradient, *ctx.options, needed[3])
    return *(of if need else None for of, need in zip(found, needed[:4], strict=True)), *[None] * 7


def _twice_differentiable(
    inputs: list[Tensor],
    needed: tuple[bool, ...],
    output_gradient: Tensor,
    log_sum_gradient: Tensor | None,
    capacity: int,
    scale: float,
    block_size: int | None,
    in_order: bool | None,
) -> list[Tensor | None]:
    """The gradients of the first four inputs as a graph of plain operations."""
    query, key, value, bias, reference, birth, death = inputs
    outputs = attend_any_births(
        query, key, value, bias, reference, Lifespans(birth, death), None, in_order=in_order, capacity=capacity,
        scale=scale, block_size=block_size, log_sum=log_sum_gradient is not None,
    )  # fmt: skip
    wanted = [number for number in range(4) if needed[number]]
    of = torch.autograd.grad(
        [tensor for tensor in outputs if tensor is not None],
        [inputs[number] for number in wanted],
        [output_gradient] if log_sum_gradient is None else [output_gradient, log_sum_gradient],
        create_graph=True,
        allow_unused=True,
    )
    return [of[wanted.index(number)] if needed[number] else None for number in range(4)]


_operator.register_autograd(_differentiate, setup_context=_save)
