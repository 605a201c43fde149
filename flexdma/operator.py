"""Attention over lifespans: the waist between why a key lives and how its attention is computed."""

import torch
from torch import Tensor

from flexdma import checks
from flexdma.lifespans import Lifespans
from flexdma.lifespans.visible import births_are_positions, most_visible
from flexdma.lowerings.attend import attend
from flexdma.mixed_precision import autocast
from flexdma.rounding import power_of_two_from
from flexdma.signatures import ScoreMod
from flexdma.transforms import can_read, refuse_jit_trace


def lifespan_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lifespans: Lifespans,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    capacity: int | None = None,
    lowering: str | None = None,
    block_size: int | tuple[int, int] | None = None,
    kernel_options: dict | None = None,
    in_order: bool | None = None,
) -> Tensor:
    """Attention in which key j is visible to the query at position i where birth_j <= i < death_j.

    query: [B, Hq, Q, D]; the queries are the last Q of the K positions, Q <= K.
    key: [B, Hkv, K, D], value: [B, Hkv, K, Dv], of query's dtype; Hkv divides Hq (query head h reads head h // G).
    lifespans: birth and death [B, Hkv, K] or [B, 1, K], int32 or int64, any numbers: a birth may come before or after the
        key's own position (0 or less: from the beginning), a death after the last position means to the end, and
        death <= birth never.
    bias: [B, Hkv, K] or [B, 1, K], any float dtype, added to the logits of a key; float64 exact for numbers that grow with
        position.  None: nothing.
    scale, score_mod: as in `dynamic_mask_attention`; positions are those of query and key.
    capacity: upper bound on the keys that one query sees.  None counts them, which reads the device; inside torch.compile,
        torch.func and fake tensors nothing can be read, and it is K.
    lowering, block_size, kernel_options: as in `dynamic_mask_attention`.
    in_order: True promises that each key that is ever visible is born at its own position.  None looks, which reads the
        device; where nothing can be read it assumes not, and gather computes twice the rows.
        A capacity or a promise that does not hold raises on a CPU outside of torch.compile; elsewhere results are wrong.

        birth = [0 1 2 2], death = [4 2 4 4]        query 0: 0
                                                    query 1: 0 1
                                                    query 2: 0   2 3        key 3 is born before its own position
                                                    query 3: 0   2 3

    Returns [B, Hq, Q, Dv], in query's dtype.  A query that sees no key gives 0, and gradient 0.
    Differentiable in query, key, value, bias, and what score_mod captures.
    Raises ValueError or TypeError naming the argument.  O(K log K + Q capacity) time.
    Intervals per key are the masks of FlashMask (arXiv 2410.01359).
    """
    refuse_jit_trace()
    query, key, value = autocast(query, key, value)
    checks.attention_arguments(query, key, value)
    checks.lifespans(lifespans, key)
    if bias is not None:
        checks.bias("bias", bias, key)
    checks.scores(scale, score_mod)
    if capacity is not None:
        checks.positive_int("capacity", capacity)
    if in_order is not None and not isinstance(in_order, bool):
        raise TypeError(f"in_order: expected a bool or None, got {type(in_order).__name__}")
    birth, death = (bound.clamp(0, key.shape[2]).to(torch.int32).contiguous() for bound in lifespans)
    lifespans = Lifespans(birth, death.masked_fill(death <= birth, 0))
    if can_read(query):
        on_cpu = query.device.type == "cpu"
        if capacity is None or on_cpu:
            capacity = _counted(capacity, lifespans, query.shape[2])
        if in_order is None or (in_order and on_cpu):
            in_order = _looked_at(in_order, lifespans)
    return attend(
        query, key, value, bias, lifespans, in_order=in_order, ranked=False, capacity=capacity, scale=scale,
        score_mod=score_mod, lowering=lowering, block_size=block_size, kernel_options=kernel_options, sink_logits=None,
    )  # fmt: skip


def _counted(capacity: int | None, lifespans: Lifespans, queries: int) -> int:
    """The given bound where it holds; for None one from counting, rounded up, as flex is compiled for each capacity."""
    most = most_visible(lifespans, queries)
    if capacity is not None and most > capacity:
        raise ValueError(f"capacity: expected at least {most}, the most keys that one query sees, got {capacity}")
    return power_of_two_from(most) if capacity is None else capacity


def _looked_at(in_order: bool | None, lifespans: Lifespans) -> bool:
    """Whether births are positions.  ValueError where that was promised and is not so."""
    found = births_are_positions(lifespans)
    if in_order and not found:
        raise ValueError("in_order: expected None or False, as some births are not their keys' positions, got True")
    return found
