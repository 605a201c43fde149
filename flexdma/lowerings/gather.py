"""The gather lowering: gather the living keys of each block of queries, then attend to them.

O(N (w + block)) time, differentiable in every argument, on every device and dtype.  On a CPU the blocks go to PyTorch's
flash kernel (fused.py); elsewhere, with a score_mod, and with D other than Dv, to plain PyTorch operations (plain.py).
living_keys.py and living_terms.py find the living keys of a block.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from flexdma.lifespans import Lifespans
from flexdma.lowerings.fused import fused_attend, is_fusible
from flexdma.lowerings.reference_gate import biases
from flexdma.lowerings.sink_logits import share_of_keys, sink_scores
from flexdma.lowerings.timeline import attend_any_births
from flexdma.signatures import ScoreMod
from flexdma.transforms import is_exporting, is_recorded, needs_gradient


def gather_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    lifespans: Lifespans,
    *,
    in_order: bool | None,
    best_stays: bool,
    capacity: int,
    scale: float,
    score_mod: ScoreMod | None,
    block_size: int | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """softmax(score_mod(q . k * scale) + bias) v over the keys alive at each query; see `lifespan_attention`.

    in_order, best_stays: see `flexdma.lowerings.attend`.
    block_size: of queries; None = `plain.BLOCK_SIZE`, or `fused_cut.block_size_for` where fused.
    """
    fusible = score_mod is None and is_fusible(query, value, scale)
    trains = needs_gradient(query, key, value, bias, sink_logits)
    exporting = is_exporting()
    if not exporting:
        capacity = min(capacity, lifespans.birth.shape[-1])
    elif not has_static_value(capacity):
        raise ValueError(
            "capacity: expected an int for 'gather' with a symbolic length in torch.export (for selection='threshold' "
            "its window_size), got None; or lowering='dense'"
        )
    if fusible and not trains and not exporting and (torch.compiler.is_compiling() or is_recorded(query)):
        return _operator(
            query, key, value, bias, *lifespans, in_order, best_stays, capacity, scale, block_size, sink_logits
        )
    attend: Callable[..., tuple[Tensor, Tensor | None]] = fused_attend
    if exporting or not fusible:
        attend = partial(attend_any_births, log_sum=sink_logits is not None, masked=fusible and not trains)
    bias, reference = biases(key, bias, lifespans, query.shape[2], best_stays=best_stays, exact=sink_logits is not None)
    output, log_sum = attend(
        query, key, value, bias, reference.detach(), lifespans, score_mod, in_order=in_order, capacity=capacity,
        scale=scale, block_size=block_size,
    )  # fmt: skip
    if sink_logits is None or log_sum is None:
        return output
    sink = sink_scores(sink_logits, reference).transpose(2, 3).flatten(1, 2)  # [B, Hq, Q]
    return (output * share_of_keys(log_sum, sink.to(log_sum.dtype))[..., None]).to(query.dtype)


def _operator_body(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    birth: Tensor,
    death: Tensor,
    in_order: bool | None,
    best_stays: bool,
    capacity: int,
    scale: float,
    block_size: int | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """`gather_attend` where it is fusible and needs no gradient."""
    return gather_attend(
        query, key, value, bias, Lifespans(birth, death), in_order=in_order, best_stays=best_stays, capacity=capacity,
        scale=scale, score_mod=None, block_size=block_size, sink_logits=sink_logits,
    )  # fmt: skip


_operator = torch.library.custom_op("flexdma::attend_living_keys", _operator_body, mutates_args=())
_operator.register_fake(lambda query, *others: torch.empty_like(query, memory_format=torch.contiguous_format))
