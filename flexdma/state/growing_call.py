"""Attention of new tokens after a GrowingState, and the state after them: one token, or a chunk by the lowerings."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexdma.lowerings.attend import attend
from flexdma.rounding import levels, power_of_two_from
from flexdma.signatures import ScoreMod
from flexdma.state.carry import score_mod_at_positions
from flexdma.state.growing import GrowingState, check_growing_state
from flexdma.state.growing_chunk import NewKeys, Placed, after_chunk, placed
from flexdma.state.growing_slots import FEWEST_SLOTS, GROWING_SLOTS, slots_for
from flexdma.state.growing_token import FULL, after_token, attention_after
from flexdma.state.value import State
from flexdma.transforms import can_read, is_exporting, is_transformed, needs_gradient


def attend_growing(
    query: Tensor,
    new: NewKeys,
    state: State | None,
    options: Mapping[str, Any],
    *,
    scale: float | None,
    score_mod: ScoreMod | None,
    sink_logits: Tensor | None,
    ranked: bool,
    donate: bool,
    lowering: str | None,
    block_size: int | tuple[int, int] | None,
    kernel_options: Mapping[str, object] | None,
) -> tuple[Tensor, GrowingState]:
    """Attention [B, Hq, Q, Dv] of the last Q of n new tokens, and the state after them.

    options: of the state, by name.  ranked: see `flexdma.lowerings.attend`.  Others as in `dynamic_mask_attention`.
    """
    _refuse_here()
    key, value, gate = new.key, new.value, new.gate
    if state is None:
        before = GrowingState.empty(
            key.shape[0], key.shape[1], key.shape[3], value_dim=value.shape[3], dtype=key.dtype, gate_dtype=gate.dtype,
            device=key.device, **options,
        )  # fmt: skip
    else:
        check_growing_state(state, key, value, gate.dtype, options)
        assert isinstance(state, GrowingState)
        before = state
    if key.shape[2] == 1 and lowering is block_size is kernel_options is None:
        scale = query.shape[3] ** -0.5 if scale is None else scale
        return _token(query, new, before, scale, score_mod, sink_logits, donate)
    put = placed(before, new)
    scores: dict[str, Any] = {"scale": scale, "score_mod": score_mod, "sink_logits": sink_logits}
    if score_mod is not None:
        scores["score_mod"] = score_mod_at_positions(score_mod, put.keys, before.length, query.shape[1] // key.shape[1])
    output = attend(
        query, put.keys.key, put.keys.value, put.keys.gate, put.lifespans, in_order=True, ranked=ranked,
        capacity=_capacity(put), lowering=lowering, block_size=block_size, kernel_options=kernel_options, **scores,
    )  # fmt: skip
    alive = put.alive
    if can_read(query):
        living = int(alive.sum(-1).max()) if alive.numel() else 0
        slots = slots_for(living + 1, before.position.shape[-1])
        return output, after_chunk(before, new, put, alive, slots)._with(_room=slots - living)
    slots = max(FEWEST_SLOTS, 1 << levels(key.shape[2])) if state is None else before.position.shape[-1]
    _assert_room(alive.sum(-1) <= slots)
    return output, after_chunk(before, new, put, alive, slots)


def _token(
    query: Tensor, new: NewKeys, state: GrowingState, scale: float, score_mod: ScoreMod | None,
    sink_logits: Tensor | None, donate: bool,
) -> tuple[Tensor, GrowingState]:  # fmt: skip
    if not can_read(query):
        _assert_room((state.position < 0).any(-1))
        after = after_token(state, new, in_place=donate)
        return attention_after(query, state.length, after, scale, score_mod, sink_logits, reads=False), after
    before = state.reserve(1)
    slots = [getattr(state, name) for name in GROWING_SLOTS]
    reads = query.is_cpu and not needs_gradient(query, new.key, new.value, new.gate, sink_logits, *slots)
    if reads and not donate and before.key is state.key:
        before = before._with(**{name: getattr(before, name).clone() for name in GROWING_SLOTS})
    after = after_token(before, new, in_place=reads or donate)
    room = None if before._room is None else before._room - 1
    output = attention_after(query, state.length, after, scale, score_mod, sink_logits, reads=reads)
    return output, after._with(_room=room)


def _capacity(put: Placed) -> int | None:
    """Upper bound on the keys that one query sees; None = no bound.  Read on a CPU only, where this does not synchronise."""
    seen = put.seen
    if not seen.is_cpu or not can_read(seen) or not seen.numel():
        return None
    # A power of two, because flex compiles once per capacity.
    return power_of_two_from(int(seen.max()))


def _assert_room(has_room: Tensor) -> None:
    """Raise on a CPU, and fail on a GPU as a device assertion, where a compiled call has no room for its keys."""
    if torch.compiler.is_compiling():
        torch._assert_async(has_room.all(), FULL)


def _refuse_here() -> None:
    """Raise where the number of slots cannot follow the number of keys."""
    if is_exporting():
        raise ValueError(
            "return_state: expected False in torch.export for a selection without a bound, because the number of slots of "
            "its state depends on values"
        )
    if is_transformed():
        raise ValueError(
            "return_state: expected False inside torch.func and forward-mode AD for a selection without a bound, because the "
            "number of slots of its state depends on values"
        )
