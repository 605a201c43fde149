"""Attention over lifespans: the one operator between the policies that make lifespans and the lowerings that use them."""

from collections.abc import Mapping

from torch import Tensor

from flexdma import checks
from flexdma.lifespans import Lifespans
from flexdma.lifespans.terms import as_terms, bias_of_terms
from flexdma.lifespans.visible import births_are_positions, most_visible
from flexdma.lowerings.attend import attend
from flexdma.mixed_precision import autocast
from flexdma.rounding import power_of_two_from
from flexdma.signatures import Biases, Intervals, ScoreMod
from flexdma.transforms import can_read, refuse_jit_trace


def lifespan_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lifespans: Intervals,
    *,
    bias: Biases = None,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    capacity: int | None = None,
    lowering: str | None = None,
    block_size: int | tuple[int, int] | None = None,
    kernel_options: Mapping[str, object] | None = None,
    in_order: bool | None = None,
    packed: bool | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention in which key j is visible to the query at position i where birth_j <= i < death_j.

    query: [B, Hq, Q, D]; the queries are the last Q of the K positions, Q <= K.
    key: [B, Hkv, K, D], value: [B, Hkv, K, Dv], of query's dtype; Hkv divides Hq (query head h reads head h // G).
    lifespans: birth and death [B, Hkv, K] or [B, 1, K], int32 or int64, any numbers.  A birth may come before or after the
        key's own position; birth <= 0 = from the first query on, death >= K = to the end, death <= birth = never visible.
        Or a sequence of P such pairs: a key then is one term of the softmax for each of its intervals that contains the
        query.  A mask has disjoint intervals; where intervals overlap, a query sees the key more than once.
    bias: [B, Hkv, K] or [B, 1, K], any float dtype, added to the logits of a key.  float64 keeps numbers that grow with
        position exact.  None = no bias.  With a sequence of lifespans one bias for all of them, or a sequence of P.
    scale, score_mod: as in `dynamic_mask_attention`; positions are those of query and key.
    capacity: upper bound on the keys that one query sees, each counted once per interval.  None counts them, which reads the
        device; inside torch.compile, torch.func and with fake tensors nothing can be read, and None means P K.
    lowering, block_size, kernel_options: as in `dynamic_mask_attention`.
    in_order: True = the caller guarantees that each key that is ever visible is born at its own position.  None checks it,
        which reads the device; where nothing can be read, None means False.  Several intervals have no such order, and True
        raises.  A wrong capacity or in_order raises on a CPU outside of torch.compile.  Elsewhere the results are wrong.
    packed: of lowering="flex", which has the same result for all: True = keys are packed by lifespan, False = they stay in
        their own order, as documents and windows may.  None = where fewer blocks are visited, which reads the device; where
        nothing can be read, None means True.
    sink_logits: [Hq], learned sinks, as in `dynamic_mask_attention`; scores are relative to the best bias that a query sees.

        birth = [0 1 2 2], death = [4 2 4 4]        query 0: 0
                                                    query 1: 0 1
                                                    query 2: 0   2 3        key 3 is born before its own position
                                                    query 3: 0   2 3

    Returns [B, Hq, Q, Dv], in query's dtype.  A query that sees no key gives 0, and gradient 0.
    Differentiable in query, key, value, each bias, sink_logits, and tensors that score_mod captures.
    Raises ValueError or TypeError naming the argument.  O(P K log P K + Q capacity) time; gather in plain operations
    (`lowerings/plain.py`) needs (P K + Q) capacity where births are not positions.
    One interval per key is the mask format of FlashMask (arXiv 2410.01359), which also has two.
    """
    refuse_jit_trace()
    query, key, value = autocast(query, key, value)
    checks.attention_arguments(query, key, value)
    intervals, biases = checks.intervals(lifespans, bias, key)
    checks.scores(scale, score_mod)
    checks.sink_logits(sink_logits, query)
    if capacity is not None:
        checks.positive_int("capacity", capacity)
    if in_order is not None and not isinstance(in_order, bool):
        raise TypeError(f"in_order: expected a bool or None, got {type(in_order).__name__}")
    if packed is not None and not isinstance(packed, bool):
        raise TypeError(f"packed: expected a bool or None, got {type(packed).__name__}")
    if len(intervals) > 1:
        if in_order:
            raise ValueError(f"in_order: expected None or False with {len(intervals)} intervals per key, got True")
        in_order = False
    terms = as_terms(intervals, key.shape[2])
    if can_read(query):
        on_cpu = query.device.type == "cpu"
        if capacity is None or on_cpu:
            capacity = _checked_capacity(capacity, terms, query.shape[2])
        if in_order is None or (in_order and on_cpu):
            in_order = _checked_order(in_order, terms)
    return attend(
        query, key, value, None, terms, bias=bias_of_terms(biases), in_order=in_order, ranked=False, best_stays=False,
        capacity=capacity, scale=scale, score_mod=score_mod, lowering=lowering, block_size=block_size,
        kernel_options=kernel_options, sink_logits=sink_logits, packed=packed,
    )  # fmt: skip


def _checked_capacity(capacity: int | None, lifespans: Lifespans, queries: int) -> int:
    """The given bound, or ValueError where it does not hold; for None the count, rounded up to a power of two.

    flex compiles once per capacity, so rounding saves compilations.
    """
    most = most_visible(lifespans, queries)
    if capacity is not None and most > capacity:
        raise ValueError(f"capacity: expected at least {most}, the most keys that one query sees, got {capacity}")
    return power_of_two_from(most) if capacity is None else capacity


def _checked_order(in_order: bool | None, lifespans: Lifespans) -> bool:
    """Whether births are positions.  Raises ValueError where in_order is True and they are not."""
    found = births_are_positions(lifespans)
    if in_order and not found:
        raise ValueError("in_order: expected None or False, as some births are not their keys' positions, got True")
    return found
