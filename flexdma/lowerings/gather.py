"""The gather lowering: gather the living keys of each block of queries, then attend to them.

O(N (w + block)) time, differentiable in every argument, on every device and dtype.  On a CPU the blocks go to PyTorch's
flash kernel (fused.py); elsewhere, with a score_mod, and with D other than Dv, to plain PyTorch operations (plain.py).
living_keys.py finds the living keys of a block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from flexdma.lifespans import Lifespans
from flexdma.lowerings.fused import fused_attend, is_fusible
from flexdma.lowerings.plain import plain_attend
from flexdma.lowerings.sink_logits import share_of_keys, sink_scores
from flexdma.lowerings.timeline import attend_any_births
from flexdma.signatures import ScoreMod
from flexdma.transforms import can_read, is_exporting, is_recorded, needs_gradient


def gather_attend(
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
    score_mod: ScoreMod | None,
    block_size: int | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """softmax(score_mod(q . k * scale) + bias) v over the keys alive at each query; see `lifespan_attention`.

    in_order, ranked: see `flexdma.lowerings.attend`.
    block_size: of queries; None = `plain.BLOCK_SIZE`, or `fused_cut.block_size_for` where fused.
    """
    fusible = score_mod is None and is_fusible(query, value, scale)
    trains = needs_gradient(query, key, value, bias, sink_logits)
    exporting = is_exporting()
    if not exporting:
        capacity = min(capacity, key.shape[2])
    elif not has_static_value(capacity):
        raise ValueError(
            "capacity: expected an int for 'gather' with a symbolic length in torch.export (for selection='threshold' "
            "its window_size), got None; or lowering='dense'"
        )
    if fusible and not trains and not exporting and (torch.compiler.is_compiling() or is_recorded(query)):
        # Inside the operator births can be read.
        return _operator(
            query, key, value, bias, *lifespans, in_order, ranked, capacity, scale, block_size, sink_logits
        )
    attend: Callable[..., Any] = fused_attend
    if exporting or not fusible:
        attend = partial(plain_attend, log_sum=sink_logits is not None, masked=fusible and not trains)
    attend = partial(attend, capacity=capacity, scale=scale, block_size=block_size)
    return attend_any_births(
        partial(_with_sinks, attend, sink_logits), query, key, value, bias, lifespans, in_order=in_order, ranked=ranked,
        exact=sink_logits is not None, score_mod=score_mod, reads_device=can_read(query),
    )  # fmt: skip


def _operator_body(
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
    """`gather_attend` where it is fusible and needs no gradient."""
    return gather_attend(
        query, key, value, bias, Lifespans(birth, death), in_order=in_order, ranked=ranked, capacity=capacity,
        scale=scale, score_mod=None, block_size=block_size, sink_logits=sink_logits,
    )  # fmt: skip


_operator = torch.library.custom_op("flexdma::attend_living_keys", _operator_body, mutates_args=())
_operator.register_fake(lambda query, *others: torch.empty_like(query, memory_format=torch.contiguous_format))


def _with_sinks(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    sink_logits: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    reference: Tensor,
    lifespans: Lifespans,
    score_mod: ScoreMod | None,
) -> Tensor:
    """`attend`, and learned sinks beside its keys."""
    output, log_sum = attend(query, key, value, bias, reference.detach(), lifespans, score_mod)
    if sink_logits is None or log_sum is None:
        return output
    sink = sink_scores(sink_logits, reference).transpose(2, 3).flatten(1, 2)  # [B, Hq, Q]
    return (output * share_of_keys(log_sum, sink.to(log_sum.dtype))[..., None]).to(query.dtype)
