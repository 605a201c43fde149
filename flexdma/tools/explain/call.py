"""`explain`: report what gates select, what that costs, and whether it pays."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from flexdma import checks, lifespans
from flexdma.lifespans import Selection
from flexdma.lowerings.default_options import default_block_size
from flexdma.packing.rows import FoldedRows
from flexdma.tools.cost_model import counts
from flexdma.tools.cost_model.counts import BlockCounts, KeyCounts
from flexdma.tools.cost_model.measured import RATES, Problem, Rates
from flexdma.tools.cost_model.pairs import shown_pairs
from flexdma.tools.explain.advice import Situation, advise
from flexdma.tools.explain.break_even import break_even_length, break_even_window, speedup
from flexdma.tools.explain.report import Explanation, Prediction

Counts = TypeVar("Counts", KeyCounts, BlockCounts)
# (lowering, phase) in the order of the report.
CHOICES = (("gather", "inference"), ("gather", "training"), ("flex", "inference"), ("flex", "training"))


@torch.no_grad()
def explain(
    gate: Tensor,
    window_size: int | Sequence[int] | None,
    *,
    num_query_heads: int | None = None,
    selection: str = "causal",
    sinks: int = 0,
    recent: int = 0,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    block_size: int | tuple[int, int] | None = None,
    rates: dict[tuple[str, str], Rates] | None = None,
) -> Explanation:
    """Report which keys these gates select, which blocks a kernel visits, and whether that is predicted to pay.

    gate: [B, Hkv, K].  It and window_size, selection, sinks, recent, key_padding_mask and document_ids are as in
        `dynamic_mask_attention`.
    num_query_heads: Hq, a multiple of Hkv; None = Hkv.  Expand a gate [B, 1, K] that all KV heads share to [B, Hkv, K]
        first, because a block has the query heads of one KV head.
    block_size: of the mask; None = the flex lowering's default for the gate's device.
    rates: of the cost model, (device type, phase) -> Rates; None = those of flexdma.  `measured_rates` in
        flexdma.tools.explain.calibration measures them.

    Counts are exact.  Predictions come from a cost model (docs/explain.md) with rates measured on one machine, which the
    report names.  For a device without measured rates there are counts and no prediction.

        print(flexdma.explain(gate, 1024, num_query_heads=8))

    Returns an Explanation.  Raises ValueError or TypeError naming the argument.  O(K log K) time and four ints per block;
    synchronises with the device.
    """
    options: dict[str, Any] = {
        "sinks": sinks,
        "recent": recent,
        "key_padding_mask": key_padding_mask,
        "document_ids": document_ids,
    }
    batch, heads, length = checks.tensor("gate", gate, ("B", "Hkv", "K")).shape
    policy = Selection.of(selection, window_size, sinks, recent, heads=heads, kinds=checks.SELECTIONS_BY_GATE)
    alive = policy.lifespans(gate, key_padding_mask=key_padding_mask, document_ids=document_ids)
    if not batch * heads * length:
        raise ValueError(f"gate: expected at least one key, got {list(gate.shape)}")
    group = checks.group_size("gate", heads, num_query_heads)
    widest, always = policy.widest or length, sinks + recent
    device = gate.device.type
    size = default_block_size(device) if block_size is None else checks.block_sizes(block_size)

    rows = FoldedRows.of(length, group, size[0], device)
    keys_per_head = counts.key_counts(alive)
    packed_per_head = counts.block_counts(alive, rows, size, capacity=widest + always)
    keys = _mean(keys_per_head)
    packed = _mean(packed_per_head)
    natural = _mean(counts.block_counts(alive, rows, size))
    pairs = group * float(shown_pairs(length, widest + always))
    problem = Problem(length, widest, always, group, packed.visited * size[0] * size[1] / pairs)
    predictions = _predictions(RATES if rates is None else rates, device, problem)

    everything = lifespans.sliding_window(gate, length, **options)
    sliding = lifespans.sliding_window(gate, window_size, **options) if window_size is not None else everything
    situation = Situation(
        selection, length, widest + always, always, _longest(everything), counts.evictions(alive, everything),
        counts.same_mask(alive, sliding), keys, natural, packed, predictions,
    )  # fmt: skip
    return Explanation(
        batch=batch, heads=heads, query_heads=heads * group, length=length,
        window_size=checks.windows(window_size, heads, needed=False), selection=selection,
        device=device, block_size=size, keys=keys, natural=natural, packed=packed,
        causal_blocks=counts.causal_blocks(rows, size), keys_per_head=keys_per_head,
        packed_per_head=packed_per_head, predictions=predictions, advice=advise(situation),
    )  # fmt: skip


def _predictions(known: dict[tuple[str, str], Rates], device: str, problem: Problem) -> list[Prediction]:
    predictions = []
    for lowering, phase in CHOICES:
        rates = known.get((device, phase))
        if rates is None or rates.of(lowering) is None:
            continue
        if not problem.rho:
            continue  # no key is visible, so there is no prediction
        predictions.append(
            Prediction(
                lowering,
                phase,
                speedup(rates, lowering, problem),
                break_even_length(rates, lowering, problem),
                break_even_window(rates, lowering, problem),
                rates.measured_on,
            )
        )
    return predictions


def _longest(everything: lifespans.Lifespans) -> int:
    """Number of tokens of the longest document."""
    return int((everything.death - everything.birth).max())


def _mean(per_head: list[Counts]) -> Counts:
    """The mean of each field."""
    names = [field.name for field in dataclasses.fields(per_head[0])]
    return type(per_head[0])(**{name: sum(getattr(one, name) for one in per_head) / len(per_head) for name in names})
