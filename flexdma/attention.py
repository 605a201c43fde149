"""Dynamic Mask Attention: select keys by their gates, then attend over the lifespans of the selection.

"Trainable Dynamic Mask Sparse Attention", arXiv 2508.02124:

    o_i = sum over j in the top-w of {gate_j : j <= i} of  softmax_j(q_i . k_j * scale + gate_j + bias_j) v_j

The paper has no bias.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from flexdma import checks
from flexdma.lifespans import Selection
from flexdma.lowerings.attend import attend
from flexdma.mixed_precision import autocast
from flexdma.signatures import AttentionOptions, ScoreMod
from flexdma.state import DynamicMaskState, State, check_state_matches, state_options
from flexdma.state.carry import first_keys, of_heads, score_mod_at_positions, state_after, with_state_keys
from flexdma.state.decoding import decode, is_next_token
from flexdma.state.donation import check_donation
from flexdma.state.growing import growing_options
from flexdma.state.growing_call import attend_growing
from flexdma.state.growing_chunk import NewKeys
from flexdma.transforms import refuse_jit_trace


@overload
def dynamic_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    *,
    window_size: int | Sequence[int] | None,
    state: State | None = None,
    return_state: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...


@overload
def dynamic_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    *,
    window_size: int | Sequence[int] | None,
    state: State | None = None,
    return_state: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, State]: ...


@overload
def dynamic_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    *,
    window_size: int | Sequence[int] | None,
    state: State | None = None,
    return_state: bool,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, State]: ...


def dynamic_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    *,
    window_size: int | Sequence[int] | None,
    selection: str = "causal",
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    bias: Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    state: State | None = None,
    return_state: bool = False,
    donate: bool = False,
    lowering: str | None = None,
    block_size: int | tuple[int, int] | None = None,
    kernel_options: Mapping[str, object] | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor | tuple[Tensor, State]:
    """Attention in which each query sees the `window_size` best-gated keys at or before it; gates are added to the logits.

    query: [B, Hq, Q, D]; the queries are the last Q of the K positions, Q <= K.
    key: [B, Hkv, K, D], value: [B, Hkv, K, Dv], of query's dtype; Hkv divides Hq (query head h reads head h // G).
    gate: [B, Hkv, K] or [B, 1, K], any float dtype.  float64 keeps gates that grow with position exact (see ValueGate);
        others are ranked and added in float32.  The range is float32's.  -inf = never visible.  NaN ranks highest and makes
        the output NaN.
        None = no gates, for the selections that do not choose by them.
    window_size: w, or one int per gate head.  With selection="threshold" it may be None, with "full" it must be.
    selection: "causal": a top-w for each query, as in the paper.  "global": one top-w for all queries, still seen
        causally.  "threshold": all keys with gate > 0, or with a window_size the running top-w among them.  "sliding": the
        last w + recent positions.  "full": all keys at or before the query.
    scale: default D ** -0.5.
    score_mod: FlexAttention's signature, on original positions and query heads; applied to q . k * scale, before the gate
        is added.  It is called with broadcastable index tensors, so it must be elementwise.
    bias: [B, Hkv, K] or [B, 1, K], any float dtype: added to the logits beside the gate, and not ranked.  A recency here
        weighs keys and does not choose them.  The sum is computed in float64 where one of the two is float64, which keeps
        numbers that grow with position exact, else in float32.  -inf = weight 0 for a key that keeps its place among the w.
        NaN makes the output NaN where the key is visible.  A state holds biases where its tokens had some.
    sinks, recent, key_padding_mask, document_ids: as in `causal_top_w`.
    state: that of earlier tokens, as returned.  key, value, gate, key_padding_mask and document_ids then belong to the
        new tokens alone, and the result equals that of one call over all tokens.  document_ids=None continues the last
        document.  A call with one token costs O(w), or with window_size=None O(living keys), if lowering, block_size and
        kernel_options are None.
    return_state: return (output, state after these tokens): a DynamicMaskState, or with window_size=None a GrowingState,
        whose size follows the number of living keys.  Raises with selection="global", which chooses among later keys too, and
        with window_size=None inside `torch.func` and torch.export.  Without gates those of the state are 0.
    donate: the caller does not use `state` again, nor states that share its tensors.  A call with one token then overwrites
        its slots (key, value, gate, position, bias) instead of copying them.  Raises without state and return_state, where a
        gradient is needed, inside `torch.func`, and in torch.export.
    lowering: "flex", "gather", "dense", or None for that of `choose_lowering`.  All compute the same function.
    block_size: of the mask, one int or (rows, keys); None = the lowering's default.  "gather" has query blocks only.
    kernel_options: FlexAttention's, for lowering="flex".
    sink_logits: [Hq], any float dtype: learned sinks, as in GPT-OSS.  The softmax gets one more term exp(sink_logits[h]) with
        value 0; the other scores add gates minus the best gate that the query sees, with a bias sums of gate and bias minus
        the largest of them.  -inf = no sink.  Raises with recent tokens for selection="global" and "threshold", and with
        "flex" on a CPU.

    Returns [B, Hq, Q, Dv], in query's dtype, or (that, state).  A query that sees no key gives 0, and gradient 0.
    Differentiable in query, key, value, gate, bias, sink_logits, and tensors that score_mod captures.
    Under `torch.autocast` query, key and value are cast to its dtype, as by `scaled_dot_product_attention`; gates and biases
    are not.
    Inside transformations of `torch.func` and forward-mode AD lowering=None is "gather", and "flex" raises.  For meta and
    fake tensors every lowering returns the right shapes and dtypes.  `torch.jit.trace` raises NotImplementedError.
    Raises ValueError or TypeError naming the argument.  O(K log K + Q w) time; docs/design.md lists the memory.
    """
    refuse_jit_trace()
    if (
        score_mod is key_padding_mask is document_ids is sink_logits is None
        and gate is not None
        and lowering is block_size is kernel_options is None
        and (scale is None or type(scale) is float)
        and is_next_token(state, query, key, value, gate, bias, (window_size, selection, sinks, recent))
    ):
        check_donation(donate, state, return_state, query, key, value, gate, bias)
        output, after = decode(query, key, value, gate, state, bias=bias, scale=scale, donate=donate)
        return (output, after) if return_state else output
    query, key, value = autocast(query, key, value)
    checks.one_of("selection", selection, checks.SELECTIONS)
    checks.attention_arguments(query, key, value)
    checks.gate(gate, key, selection)
    if bias is not None:
        checks.bias("bias", bias, key)
    checks.scores(scale, score_mod)
    checks.sink_logits(sink_logits, query)
    policy = Selection.of(selection, window_size, sinks, recent, heads=key.shape[1] if gate is None else gate.shape[1])
    check_donation(donate, state, return_state, query, key, value, gate, bias, sink_logits)
    checks.sinks_without_recent(sink_logits, selection, recent)
    masks: dict[str, Any] = {"key_padding_mask": key_padding_mask, "document_ids": document_ids}
    scores: dict[str, Any] = {"scale": scale, "score_mod": score_mod, "sink_logits": sink_logits}
    how: dict[str, Any] = {"lowering": lowering, "block_size": block_size, "kernel_options": kernel_options}
    attend_selected: Callable[..., Tensor] = partial(
        attend, in_order=True, ranked=policy.is_ranked, best_stays=policy.best_stays, capacity=policy.capacity, **how
    )
    is_biased, gate = gate is not None, policy.gates(gate, key)
    if state is None and not return_state:
        return attend_selected(
            query, key, value, gate if is_biased else None, policy.lifespans(gate, **masks), bias=bias,
            one_document=document_ids is None, **scores,
        )  # fmt: skip

    policy.refuse_without_state()
    gate = of_heads(gate, key)
    bias = None if bias is None else of_heads(bias, key)
    checks.selected_keys(gate, **masks)
    if policy.capacity is None:
        new = NewKeys(key, value, gate, partial(policy.lifetimes, gate), None, None, bias=bias, **masks)
        output, grown = attend_growing(
            query, new, state, growing_options(policy), ranked=True, best_stays=policy.best_stays, donate=donate,
            is_biased=is_biased, **scores, **how,
        )  # fmt: skip
        return (output, grown) if return_state else output
    before = _state_before(state, key, value, gate, bias, policy)
    if state is not None and key.shape[2] == 1 and not any(option is not None for option in how.values()):
        output, after = decode(query, key, value, gate, before, bias=bias, **scores, **masks, donate=donate)
        return (output, after) if return_state else output
    if state is None:
        keys = first_keys(key, value, gate, bias=bias, **masks)
    else:
        keys = with_state_keys(before, key, value, gate, bias=bias, **masks)
        if score_mod is not None:
            group = query.shape[1] // key.shape[1]
            scores["score_mod"] = score_mod_at_positions(score_mod, keys, state.length, group)
    lifespans = policy.lifespans(keys.gate, key_padding_mask=keys.key_padding_mask, document_ids=keys.document_ids)
    output = attend_selected(
        query, keys.key, keys.value, keys.gate if is_biased else None, lifespans, bias=keys.bias,
        one_document=keys.document_ids is None, **scores,
    )  # fmt: skip
    return (output, state_after(before, keys, lifespans)) if return_state else output


def _state_before(
    state: State | None, key: Tensor, value: Tensor, gate: Tensor, bias: Tensor | None, policy: Selection
) -> DynamicMaskState:
    """The given state, checked against these arguments; an empty one for None."""
    bias_dtype = None if bias is None else bias.dtype
    if state is None:
        batch, heads, _keys, size = key.shape
        return DynamicMaskState.empty(
            batch, heads, size, value_dim=value.shape[3], dtype=key.dtype, gate_dtype=gate.dtype,
            bias_dtype=bias_dtype, device=key.device, **state_options(policy),
        )  # fmt: skip
    check_state_matches(state, key, value, gate.dtype, policy, bias_dtype)
    assert isinstance(state, DynamicMaskState)
    return state
