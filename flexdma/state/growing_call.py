"""Attention of new tokens after a GrowingState, and the state after them: one token, or a chunk by the lowerings."""

from collections.abc import Callable, Mapping, Sequence
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
from flexdma.state.layout import slot_tensors
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
    best_stays: bool,
    donate: bool,
    lowering: str | None,
    block_size: int | tuple[int, int] | None,
    kernel_options: Mapping[str, object] | None,
    is_biased: bool = True,
) -> tuple[Tensor, GrowingState]:
    """Attention [B, Hq, Q, Dv] of the last Q of n new tokens, and the state after them.

    options: of the state, by name.  ranked, best_stays: see `flexdma.lowerings.attend`.  is_biased: False = all gates are 0.
    Others as in `dynamic_mask_attention`.
    """
    group = query.shape[1] // new.key.shape[1]

    def of_chunk(put: Placed, before: GrowingState) -> Tensor:
        at_positions = None
        if score_mod is not None:
            at_positions = score_mod_at_positions(score_mod, put.keys, before.length, group)
        return attend(
            query, put.keys.key, put.keys.value, put.keys.gate if is_biased else None, put.lifespans,
            bias=put.keys.bias, in_order=True, ranked=ranked, best_stays=best_stays, capacity=seen_at_most(put),
            lowering=lowering, block_size=block_size, kernel_options=kernel_options, scale=scale, score_mod=at_positions,
            sink_logits=sink_logits,
        )  # fmt: skip

    def of_token(after: GrowingState, now: Tensor, reads: bool) -> Tensor:
        size = query.shape[3] ** -0.5 if scale is None else scale
        return attention_after(query, now, after, size, score_mod, sink_logits, reads=reads)

    is_token = new.key.shape[2] == 1 and lowering is block_size is kernel_options is None
    return attend_by(of_chunk, of_token if is_token else None, new, state, options, (query, sink_logits), donate)


def attend_by(
    of_chunk: Callable[[Placed, GrowingState], Tensor], of_token: Callable[[GrowingState, Tensor, bool], Tensor] | None,
    new: NewKeys, state: State | None, options: Mapping[str, Any], others: Sequence[Tensor | None], donate: bool,
) -> tuple[Tensor, GrowingState]:  # fmt: skip
    """Any attention of new tokens after a state, and the state after them.

    of_chunk: (keys in places, the state before them) -> output.
    of_token: for one token: (the state after it, its position [B], whether values may be read) -> output; None: by of_chunk
    others: further tensors of the call, which may need gradients.
    """
    _refuse_here()
    key, value, gate = new.key, new.value, new.gate
    bias_dtype = None if new.bias is None else new.bias.dtype
    if state is None:
        before = GrowingState.empty(
            key.shape[0], key.shape[1], key.shape[3], value_dim=value.shape[3], dtype=key.dtype, gate_dtype=gate.dtype,
            bias_dtype=bias_dtype, device=key.device, **options,
        )  # fmt: skip
    else:
        check_growing_state(state, key, value, gate.dtype, options, bias_dtype)
        assert isinstance(state, GrowingState)
        before = state
    if of_token is not None:
        return _token(of_token, new, before, others, donate)
    put = placed(before, new)
    output, alive = of_chunk(put, before), put.alive
    if can_read(key):
        living = int(alive.sum(-1).max()) if alive.numel() else 0
        slots = slots_for(living + 1, before.position.shape[-1])
        return output, after_chunk(before, new, put, alive, slots)._with(_room=slots - living)
    slots = max(FEWEST_SLOTS, 1 << levels(key.shape[2])) if state is None else before.position.shape[-1]
    _assert_room(alive.sum(-1) <= slots)
    return output, after_chunk(before, new, put, alive, slots)


def _token(
    of_token: Callable[[GrowingState, Tensor, bool], Tensor], new: NewKeys, state: GrowingState,
    others: Sequence[Tensor | None], donate: bool,
) -> tuple[Tensor, GrowingState]:  # fmt: skip
    if not can_read(new.key):
        _assert_room((state.position < 0).any(-1))
        after = after_token(state, new, in_place=donate)
        return of_token(after, state.length, False), after
    before = state.reserve(1)
    slots = slot_tensors(state, GROWING_SLOTS).values()
    reads = new.key.is_cpu and not needs_gradient(new.key, new.value, new.gate, new.bias, *others, *slots)
    if reads and not donate and before.key is state.key:
        before = before._with(**{name: tensor.clone() for name, tensor in slot_tensors(before, GROWING_SLOTS).items()})
    after = after_token(before, new, in_place=reads or donate)
    room = None if before._room is None else before._room - 1
    return of_token(after, state.length, reads), after._with(_room=room)


def seen_at_most(put: Placed) -> int | None:
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
