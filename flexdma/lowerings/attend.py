"""Attention over given lifespans: choose a lowering, check its options, call it.

All lowerings compute the same function of query [B, Hq, Q, D], key, value, gates and biases [B, Hkv, K] or [B, 1, K] per key
(None = none) and lifespans.  Keys with P intervals have P K of each, as `flexdma.lifespans.terms` orders them.
Four properties save work where they hold:

    in_order      each key that is ever visible is born at its own position
    ranked        the lifespans are a selection by the gate
    best_stays    the best-gated key that a query sees stays visible until a better one comes; a bias ends this, because
                  another key adds most to the logits then
    one_document  all keys are of one document

packed is of flex: whether keys are packed by lifespan or stay in their own order; None = where fewer blocks are visited.
"""

import operator
from collections.abc import Mapping

import torch
from torch import Tensor

from flexdma import checks
from flexdma.lifespans import Lifespans
from flexdma.lifespans.terms import as_intervals
from flexdma.lowerings.choice import check_lowering_options, chosen_lowering
from flexdma.lowerings.default_options import default_blocks
from flexdma.lowerings.flash import is_flash, refusal
from flexdma.lowerings.flex import compiled_flex_attend, flex_attend
from flexdma.lowerings.gather import gather_attend
from flexdma.lowerings.reference_gate import added_to_logits
from flexdma.packing.choice import packing_saves
from flexdma.packing.rows import FoldedRows
from flexdma.reference import dense_lifespan_attention
from flexdma.signatures import ScoreMod
from flexdma.transforms import can_read, is_recorded, needs_gradient


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    lifespans: Lifespans,
    *,
    bias: Tensor | None = None,
    in_order: bool | None,
    ranked: bool,
    best_stays: bool,
    capacity: int | None,
    scale: float | None,
    score_mod: ScoreMod | None,
    lowering: str | None,
    block_size: int | tuple[int, int] | None,
    kernel_options: Mapping[str, object] | None,
    sink_logits: Tensor | None,
    packed: bool | None = True,
    one_document: bool = False,
) -> Tensor:
    """Attention [B, Hq, Q, Dv] by the chosen lowering.  The caller has checked shapes, dtypes and devices.

    gate, bias: both are added to the logits; the gate is what ranked the keys, where they are `ranked`.
    in_order: None = not known.  capacity: upper bound on the terms that one query sees; None = all.
    """
    best_stays, bias = best_stays and bias is None, added_to_logits(gate, bias)
    chosen = chosen_lowering(lowering, query)
    check_lowering_options(chosen, query.dtype, block_size, kernel_options)
    if packed is False and chosen != "flex":
        raise ValueError(
            f"packed: expected None or True for lowering={chosen!r}, which has no order of keys, got False"
        )
    if chosen == "dense":
        intervals, biases = as_intervals(lifespans, bias, key)
        return dense_lifespan_attention(
            query, key, value, intervals, bias=biases, scale=scale, score_mod=score_mod, sink_logits=sink_logits
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    capacity = lifespans.birth.shape[-1] if capacity is None else capacity
    # FlexAttention refuses an empty batch, and torch.compile refuses meta and fake tensors.
    if chosen == "gather" or query.shape[0] == 0 or is_recorded(query):
        block = None if block_size is None else checks.block_sizes(block_size)[0]
        return gather_attend(
            query, key, value, bias, lifespans, in_order=in_order, best_stays=best_stays, capacity=capacity,
            scale=scale, score_mod=score_mod, block_size=block, sink_logits=sink_logits,
        )  # fmt: skip
    trains = needs_gradient(query, key, value, bias, sink_logits)
    # Tensors that score_mod captures may need gradients too, and while tracing this is not known.
    may_need_gradient = trains or (torch.is_grad_enabled() and score_mod is not None)
    if is_flash(kernel_options):
        head_dims = (operator.index(query.shape[-1]), operator.index(value.shape[-1]))
        if why := refusal(query.device, query.dtype, head_dims, trains and sink_logits is not None):
            raise ValueError(why)
    if query.device.type == "cpu":
        _refuse_on_cpu(trains, score_mod, sink_logits)
        query, key, value = (tensor.detach() for tensor in (query, key, value))
        bias = None if bias is None else bias.detach()
    compiled = flex_attend if torch.compiler.is_compiling() else compiled_flex_attend
    blocks = None if block_size is None else checks.block_sizes(block_size)
    if packed is None and not can_read(query):
        packed = True
    if packed is None:
        tile = blocks or default_blocks(query, key.shape[1], may_need_gradient, kernel_options)
        rows = FoldedRows.of(query.shape[2], query.shape[1] // key.shape[1], tile[0], query.device.type)
        packed = packing_saves(
            lifespans, rows=rows, capacity=capacity, block_size=tile, any_births=not in_order, ranked=ranked
        )  # fmt: skip
    return compiled(
        query, key, value, bias, lifespans, in_order=bool(in_order), ranked=ranked, best_stays=best_stays,
        capacity=capacity, scale=scale, score_mod=score_mod, block_size=blocks, kernel_options=kernel_options,
        needs_gradient=may_need_gradient, sink_logits=sink_logits, packed=packed, one_document=one_document,
    )  # fmt: skip


def _refuse_on_cpu(trains: bool, score_mod: ScoreMod | None, sink_logits: Tensor | None) -> None:
    """Raise where Inductor's C++ FlexAttention cannot compute the call."""
    if sink_logits is not None:
        raise ValueError("lowering: 'flex' has no log-sum-exp on a CPU; expected 'gather' or 'dense' with sink_logits")
    if trains or (torch.is_grad_enabled() and _captures_need_gradient(score_mod)):
        raise ValueError(
            "lowering: 'flex' has no backward on a CPU; expected 'gather' or 'dense' where gradients are needed"
        )


def _captures_need_gradient(score_mod: ScoreMod | None) -> bool:
    """Whether a tensor that score_mod captures requires a gradient, found by calling it once on zeros."""
    if score_mod is None:
        return False
    first = torch.zeros((), dtype=torch.int32, device="cpu")
    return score_mod(torch.zeros((), device="cpu"), first, first, first, first).requires_grad
