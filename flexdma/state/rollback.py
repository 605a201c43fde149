"""The state before its last tokens, where it can be computed exactly."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexdma import checks
from flexdma.state.layout import emptied
from flexdma.state.value import State

if TYPE_CHECKING:
    from flexdma.state.dynamic_mask_state import DynamicMaskState


def cropped(state: "DynamicMaskState", tokens: int | Tensor) -> "DynamicMaskState":
    """`DynamicMaskState.crop`."""
    return _without_last(state, length_before(state, tokens))


def length_before(state: State, tokens: int | Tensor) -> Tensor:
    """[B]: the length of a state before its last `tokens` tokens.  Raises ValueError where that state cannot be computed."""
    if isinstance(tokens, Tensor):
        checks.tensor("tokens", tokens, (state.length.shape[0],), state.length)
        if tokens.dtype != torch.int64 or (tokens < 0).any():
            raise ValueError(f"tokens: expected int64 numbers of at least 0, got {tokens}")
    else:
        checks.positive_int("tokens", tokens, 0)
    left = state.length - tokens
    if (left < 0).any():
        raise ValueError(f"tokens: expected at most the {state.length.tolist()} tokens of each sequence, got {tokens}")
    taken = (left < state.length) & (left > 0)
    gone = (state.last_loss >= left[:, None]) & taken[:, None]
    if gone.any():
        at = int(state.last_loss[gone].max())
        raise ValueError(
            f"tokens: expected a rollback past no eviction (the last was at position {at}, and evicted keys are gone), "
            f"got {tokens}; take a state.checkpoint() before tokens that you may roll back"
        )
    if ((state.last_padding >= left) & taken).any():
        raise ValueError(
            f"tokens: expected a rollback past no padded token (the last was at position {int(state.last_padding.max())}, "
            f"and the number of real tokens before it is not kept), got {tokens}; take a state.checkpoint() before tokens "
            "that you may roll back"
        )
    if (state.forgotten.any(-1) & taken).any():
        raise ValueError(
            f"tokens: expected 0 with forget gates, because their earlier sum is not kept, got {tokens}; take a "
            "state.checkpoint() before tokens that you may roll back"
        )
    return left


def counts_at(state: State, length: Tensor) -> dict[str, Any]:
    """The tensors of the state at this length [B] that count tokens or name a position, but for `last_sink`."""
    begins = length == 0
    return {
        "length": length,
        "real_length": torch.where(begins, 0, state.real_length - state.length + length),
        "last_padding": state.last_padding.masked_fill(begins, -1),
        "document": state.document.masked_fill(begins, 0),
        "last_loss": state.last_loss.masked_fill(begins[:, None], -1),
        "forgotten": state.forgotten.masked_fill(begins[:, None], 0.0),
    }


def _without_last(state: "DynamicMaskState", length: Tensor) -> "DynamicMaskState":
    """The state at this length [B].  None of its keys has been evicted since, so it has all of those that are older."""
    later = state.position >= length[:, None, None]
    is_sink = ~later & (state.position <= state.last_sink[..., None])
    last_sink = torch.where(is_sink, state.position, -1).amax(-1)
    return replace(state, **emptied(state, later), **counts_at(state, length), last_sink=last_sink)
