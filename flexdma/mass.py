"""Attention mass: how much attention each key receives."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flexdma import checks
from flexdma.lifespans.terms import as_terms, bias_of_terms
from flexdma.lifespans.visible import births_are_positions, causal_lifespans, most_visible
from flexdma.lowerings.choice import check_lowering_options, chosen_lowering
from flexdma.lowerings.flash import is_flash
from flexdma.lowerings.flex_mass import compiled_flex_mass, flex_mass
from flexdma.lowerings.gather_mass import gather_mass
from flexdma.mixed_precision import autocast, without_autocast
from flexdma.reference import dense_attention_mass
from flexdma.rounding import power_of_two_from
from flexdma.signatures import Biases, Intervals, ScoreMod
from flexdma.transforms import can_read, is_recorded, refuse_jit_trace


def attention_mass(
    query: Tensor,
    key: Tensor,
    lifespans: Intervals | None = None,
    *,
    reduction: str = "sum",
    ages: Sequence[tuple[int, int | None]] | None = None,
    bias: Biases = None,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    lowering: str | None = None,
    block_size: int | tuple[int, int] | None = None,
    kernel_options: Mapping[str, object] | None = None,
) -> Tensor:
    """The attention that each key receives, summed over queries, or the largest; no Q x K tensor exists at any point.

    P_hij is the weight with which query i of query head h attends to key j, after the softmax over all keys that it sees.
    Key j of KV head k receives, over its G query heads h and over the queries i of some ages i - j,

        reduction = "sum"    sum of P_hij        "max"    maximum of P_hij

    query: [B, Hq, Q, D]; the queries are the last Q of the K positions, Q <= K.
    key: [B, Hkv, K, D], of query's dtype; Hkv divides Hq (query head h reads head h // G).
    lifespans: the keys that a query sees, as in `lifespan_attention`.  None = key j is visible to all i >= j.  Of several
        intervals per key the sum is over all, and the maximum is the largest of one interval.
    ages: bands (low, high).  Each counts the queries with low <= i - j < high; high = None has no end.  Bands may overlap.
        The softmax is over all visible keys in every band.  None = one result, of all ages.
    bias, scale, score_mod: as in `lifespan_attention`.
    lowering: None = "gather" for reduction="max", else `choose_lowering(device, dtype)`.
        "gather": blocks of queries, on every device.
        "flex": two FlexAttention passes, one more for each further band, and only for reduction="sum"; not on a CPU.
        "dense": the definition, O(Q K) memory.
    block_size: gather: queries per block, None = 16 to 64 by size.  flex: as in `dynamic_mask_attention`.
    kernel_options: flex only: options of FlexAttention's kernels.

        K = Q = 6, ages = [(0, 2), (2, None)]       query 0: a            a = counted by the band (0, 2)
                                                    query 1: a a          b = counted by the band (2, None)
                                                    query 2: b a a
            sum over a column of the a: band 0      query 3: b b a a
            sum over a column of the b: band 1      query 4: b b b a a
                                                    query 5: b b b b a a

    Returns [B, Hkv, K], or [bands, B, Hkv, K] where ages are given; float32, float64 for float64 inputs.  0 for keys that no
    counted query sees.  A query that sees no key adds nothing; one that sees a NaN gives NaN to the keys that it sees.
    A bias of -inf hides its key.
    No gradient: the result is detached.
    Raises ValueError or TypeError naming the argument.
    Time as a forward of attention over these lifespans.  gather adds a sort of the K keys for each block under lifespans, and
    takes O(block K Hq) memory.  In torch.compile gather is one operator on a CPU without a score_mod; otherwise it is
    unrolled over its blocks, and lifespans save no time.
    The sum over recent queries is SnapKV's score of a key (arXiv 2404.14469), over all queries H2O's (arXiv 2306.14048).
    """
    refuse_jit_trace()
    query, key = autocast(query, key)
    checks.attention_arguments(query, key, key)
    checks.one_of("reduction", reduction, checks.REDUCTIONS)
    checks.ages(ages)
    terms = None
    if lifespans is not None:
        intervals, biases = checks.intervals(lifespans, bias, key)
        terms, bias = as_terms(intervals, key.shape[2]), bias_of_terms(biases)
    elif bias is not None:
        checks.bias("bias", bias, key)
    added = bias.detach() if isinstance(bias, Tensor) else None
    checks.scores(scale, score_mod)
    query, key = query.detach(), key.detach()
    chosen = chosen_lowering(lowering or ("gather" if reduction == "max" else None), query)
    check_lowering_options(chosen, query.dtype, block_size, kernel_options)
    if chosen == "dense":
        with without_autocast(query.device):  # the definition computes in float32
            return dense_attention_mass(
                query, key, lifespans, reduction=reduction, ages=ages, bias=bias, scale=scale, score_mod=score_mod
            ).detach()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bands = None if ages is None else [(low, checks.LARGEST if high is None else high) for low, high in ages]
    if chosen == "flex":
        _check_flex(query, reduction, kernel_options)
    # FlexAttention refuses an empty batch, and torch.compile refuses meta and fake tensors.
    if chosen == "gather" or query.shape[0] == 0 or is_recorded(query):
        block = None if block_size is None else checks.block_sizes(block_size)[0]
        mass = gather_mass(
            query, key, added, terms, scale=scale, score_mod=score_mod, reduction=reduction, ages=bands,
            block_size=block,
        )  # fmt: skip
    else:
        in_order = terms is None
        if terms is None:
            terms = causal_lifespans(key)
        capacity = terms.birth.shape[-1]
        if not in_order and can_read(query):
            in_order = capacity == key.shape[2] and births_are_positions(terms)
            capacity = power_of_two_from(most_visible(terms, query.shape[2]))
        compiled = flex_mass if torch.compiler.is_compiling() else compiled_flex_mass
        mass = compiled(
            query, key, added, terms, in_order=in_order, capacity=capacity, scale=scale, score_mod=score_mod, ages=bands,
            block_size=None if block_size is None else checks.block_sizes(block_size), kernel_options=kernel_options,
        )  # fmt: skip
    mass = mass.detach()  # score_mod may capture tensors with a gradient
    return mass[:, 0] if ages is None else mass.transpose(0, 1)


def _check_flex(query: Tensor, reduction: str, kernel_options: Mapping[str, object] | None) -> None:
    """Raise where FlexAttention cannot compute the call."""
    if reduction == "max":
        raise ValueError("lowering: 'flex' sums over queries; expected 'gather', 'dense' or None with reduction='max'")
    if query.device.type == "cpu":
        raise ValueError("lowering: 'flex' has no log-sum-exp on a CPU; expected 'gather', 'dense' or None")
    if is_flash(kernel_options):
        raise ValueError(
            "kernel_options: expected another BACKEND than 'FLASH' for attention_mass, which has no values"
        )
