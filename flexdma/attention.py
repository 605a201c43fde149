"""Dynamic Mask Attention: the one entry point.

"Trainable Dynamic Mask Sparse Attention", arXiv 2508.02124:

    o_i = sum over j in the top-w of {gate_j : j <= i} of  softmax_j(q_i . k_j * scale + gate_j) v_j
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexdma import checks, lifespans
from flexdma.lowerings.choice import FLEX_DTYPES, choose_lowering
from flexdma.lowerings.flex import compiled_flex_attend, default_block_size, flex_attend
from flexdma.lowerings.gather import gather_attend
from flexdma.mixed_precision import autocast
from flexdma.reference import dense_dynamic_mask_attention
from flexdma.signatures import ScoreMod
from flexdma.stages import staged
from flexdma.state import STATEFUL_SELECTIONS, DynamicMaskState, as_window, check_state_matches, widest_window
from flexdma.state.carry import first_keys, score_mod_at_positions, state_after, with_state_keys
from flexdma.state.decoding import decode
from flexdma.transforms import is_recorded, is_transformed, needs_gradient, refuse_jit_trace


def dynamic_mask_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    *,
    window_size: int | Sequence[int] | None,
    selection: str = "causal",
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    sinks: int = 0,
    recent: int = 0,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    state: DynamicMaskState | None = None,
    return_state: bool = False,
    lowering: str | None = None,
    block_size: int | tuple[int, int] | None = None,
    kernel_options: dict | None = None,
    sink_logits: Tensor | None = None,
) -> Any:
    """Attention in which each query sees the `window_size` best-gated keys before it, and gates add to the logits.

    query: [B, Hq, Q, D]; the queries are the last Q of the K positions, Q <= K.
    key: [B, Hkv, K, D], value: [B, Hkv, K, Dv], of query's dtype; Hkv divides Hq (query head h reads head h // G).
    gate: [B, Hkv, K] or [B, 1, K], any float dtype.  float64 keeps gates that grow with position exact (see ValueGate);
        others are ranked and added in float32.  -inf = never visible; NaN ranks highest and shows in the output.
    window_size: w, or one per gate head.  With selection="threshold" it may be None.
    selection: "causal": each query its own top-w, the paper's.  "global": one top-w shared by all queries, still seen
        causally.  "threshold": all keys with gate > 0; with a window_size the running top-w among them.
    scale: default D ** -0.5.
    score_mod: FlexAttention's signature, on original positions and query heads; applied to q . k * scale, before the gate
        is added.  It is called with broadcastable index tensors, so it must be elementwise.
    sinks, recent, key_padding_mask, document_ids: as in `causal_top_w`.
    state: the keys that an earlier call's tokens left; key, value, gate, key_padding_mask and document_ids are then those
        of the new tokens alone, and the result is what one call over all tokens gives.  document_ids=None continues the
        last document.  One token at a time costs O(w), if lowering, block_size and kernel_options are left alone.
    return_state: return (output, the state after these tokens), to go on from.  Not with selection="global", whose choice
        looks ahead, nor with window_size=None, which bounds nothing.
    lowering: "flex", "gather", "dense", or None for that of `choose_lowering`.  All compute the same.
    block_size: of the mask, one int or (rows, keys); None takes the lowering's own.  "gather" has query blocks only.
    kernel_options: FlexAttention's, for lowering="flex".
    sink_logits: [Hq], any float dtype: learned sinks, as in GPT-OSS.  The softmax has one more term exp(sink_logits[h]), with
        value 0, against scores that count gates relative to the best one the query sees.  -inf = none.  Not with recent
        tokens, unless selection="causal"; not by "flex" on a CPU.

    Returns [B, Hq, Q, Dv], in query's dtype, or (that, DynamicMaskState).  A query that sees no key gives 0, and gradient 0.
    Differentiable in query, key, value, gate, sink_logits, and what score_mod captures.
    Under `torch.autocast` query, key and value are cast to its dtype, as by `scaled_dot_product_attention`; gates are not.
    Inside transformations of `torch.func` and forward-mode AD lowering=None is "gather", and "flex" is refused; of meta and
    fake tensors every lowering gives the shapes and dtypes.  `torch.jit.trace` raises NotImplementedError.
    Raises ValueError or TypeError naming the argument.  O(K log K + Q w) time; memory is given in docs/design.md.
    """
    refuse_jit_trace()
    query, key, value = autocast(query, key, value)
    checks.attention_arguments(query, key, value, gate)
    checks.one_of("selection", selection, checks.SELECTIONS)
    if lowering is not None:
        checks.one_of("lowering", lowering, checks.LOWERINGS)
    _check_scores(scale, score_mod)
    checks.sink_logits(sink_logits, query, selection, recent)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    masks: dict[str, Any] = {"key_padding_mask": key_padding_mask, "document_ids": document_ids}
    choice: dict[str, Any] = {"sinks": sinks, "recent": recent}
    before, keys = None, None
    if state is not None or return_state:
        before = _state_before(state, key, value, gate, window_size, selection, choice)
        gate = gate.to(before.gate.dtype).expand(key.shape[:3])
        window_size = before.window_size
        checks.selection_arguments(gate, window_size, sinks, recent, **masks)
        if (
            state is not None
            and key.shape[2] == 1
            and lowering is None
            and block_size is None
            and kernel_options is None
        ):
            output, after = decode(
                query, key, value, gate, before, scale=scale, score_mod=score_mod, sink_logits=sink_logits, **masks
            )
            return (output, after) if return_state else output
        keys = (
            first_keys(key, value, gate, **masks)
            if state is None
            else with_state_keys(state, key, value, gate, **masks)
        )
        key, value, gate = keys.key, keys.value, keys.gate
        masks = {"key_padding_mask": keys.key_padding_mask, "document_ids": keys.document_ids}
        if state is not None and score_mod is not None:
            score_mod = score_mod_at_positions(score_mod, keys, state.length, query.shape[1] // key.shape[1])

    trains = needs_gradient(query, key, value, gate, sink_logits)
    # Tensors captured by score_mod may need gradients too; a tracer cannot tell.
    may_need_gradient = trains or (torch.is_grad_enabled() and score_mod is not None)
    chosen = lowering or choose_lowering(query.device.type, query.dtype)
    if chosen == "flex" and is_transformed():
        if lowering is not None:
            raise ValueError(
                "lowering: 'flex' has no rules for torch.func and forward-mode AD; expected 'gather', 'dense' or None"
            )
        chosen = "gather"
    _check_lowering_options(chosen, query.dtype, block_size, kernel_options)
    if chosen != "dense" or return_state:
        alive = select(selection, gate, window_size, choice | masks)
    # No query sees more keys than this; None: than there are.
    capacity = None if window_size is None else sinks + recent + widest_window(window_size)
    if chosen == "dense":
        output = dense_dynamic_mask_attention(
            query, key, value, gate, window_size=window_size, selection=selection, scale=scale, score_mod=score_mod,
            sink_logits=sink_logits, **choice, **masks,
        )  # fmt: skip
    elif chosen == "gather" or query.shape[0] == 0 or is_recorded(query):
        # FlexAttention takes no empty batch, and torch.compile no tensors that hold no numbers.
        block = None if block_size is None else checks.block_sizes(block_size)[0]
        output = gather_attend(
            query, key, value, gate, alive, capacity=capacity, scale=scale, score_mod=score_mod, block_size=block,
            sink_logits=sink_logits,
        )  # fmt: skip
    else:
        if query.device.type == "cpu":
            if sink_logits is not None:
                raise ValueError(
                    "lowering: 'flex' has no log-sum-exp on a CPU; expected 'gather' or 'dense' with sink_logits"
                )
            if trains or (torch.is_grad_enabled() and _captures_need_gradient(score_mod)):
                raise ValueError(
                    "lowering: 'flex' has no backward on a CPU; expected 'gather' or 'dense' where gradients are needed"
                )
            query, key, value, gate = (tensor.detach() for tensor in (query, key, value, gate))
        default = default_block_size(query.device.type)
        attend = flex_attend if torch.compiler.is_compiling() else compiled_flex_attend
        output = attend(
            query, key, value, gate, alive, capacity=capacity, scale=scale, score_mod=score_mod,
            block_size=default if block_size is None else checks.block_sizes(block_size),
            kernel_options=kernel_options, needs_gradient=may_need_gradient, sink_logits=sink_logits,
        )  # fmt: skip
    if not return_state:
        return output
    assert before is not None
    assert keys is not None
    return output, state_after(before, keys, alive)


def _state_before(
    state: DynamicMaskState | None,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    window_size: int | Sequence[int] | None,
    selection: str,
    choice: dict[str, Any],
) -> DynamicMaskState:
    """The given state, once it is one that these arguments can go on from; an empty one where there is none."""
    if selection not in STATEFUL_SELECTIONS:
        raise ValueError(f"selection: expected one of {STATEFUL_SELECTIONS} with a state, got {selection!r}")
    if window_size is None:
        raise ValueError("window_size: expected an int or one per gate head with a state, which it bounds, got None")
    windows = checks.windows(window_size, gate.shape[1], needed=True)
    gate_dtype = torch.float64 if gate.dtype == torch.float64 else torch.float32
    options = {"window_size": as_window(windows), "selection": selection, **choice}
    if state is not None:
        check_state_matches(state, key, value, gate_dtype, **options)
        return state
    batch, heads, _keys, size = key.shape
    return DynamicMaskState.empty(
        batch,
        heads,
        size,
        value_dim=value.shape[3],
        dtype=key.dtype,
        gate_dtype=gate_dtype,
        device=key.device,
        **options,
    )


@staged("lifespans")
def select(
    selection: str, gate: Tensor, window_size: int | Sequence[int] | None, choice: dict[str, Any]
) -> lifespans.Lifespans:
    """The lifespans of a selection by name; `choice` has sinks, recent, key_padding_mask and document_ids."""
    if selection == "threshold":
        return lifespans.above_threshold(gate, window_size=window_size, **choice)
    top_w = lifespans.causal_top_w if selection == "causal" else lifespans.global_top_w
    return top_w(gate, window_size, **choice)  # type: ignore[arg-type]  # None is refused there, by name


def _check_scores(scale: float | None, score_mod: ScoreMod | None) -> None:
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise TypeError(f"scale: expected a number, got {type(scale).__name__}")
    if score_mod is not None and not callable(score_mod):
        raise TypeError(f"score_mod: expected a function, got {type(score_mod).__name__}")


def _captures_need_gradient(score_mod: ScoreMod | None) -> bool:
    """Whether a tensor that score_mod captures requires a gradient: then so does a score that it makes."""
    if score_mod is None:
        return False
    first = torch.zeros((), dtype=torch.int32)
    return score_mod(torch.zeros(()), first, first, first, first).requires_grad


def _check_lowering_options(
    lowering: str, dtype: torch.dtype, block_size: int | tuple[int, int] | None, kernel_options: dict | None
) -> None:
    if lowering == "flex" and dtype not in FLEX_DTYPES:
        raise TypeError(f"lowering: 'flex' computes in float32, bfloat16 and float16, got {dtype}; expected 'gather'")
    if kernel_options is not None and not isinstance(kernel_options, dict):
        raise TypeError(f"kernel_options: expected a dict, got {type(kernel_options).__name__}")
    if kernel_options is not None and lowering != "flex":
        raise ValueError(
            f"kernel_options: expected None for lowering={lowering!r} (they are FlexAttention's), got {kernel_options!r}"
        )
    if block_size is None:
        return
    if lowering == "dense":
        raise ValueError(f"block_size: expected None for lowering='dense', got {block_size!r}")
    if lowering == "gather":
        checks.positive_int("block_size", block_size)  # of queries; keys have no blocks here
    else:
        checks.block_sizes(block_size)
