"""The state that belongs to a selection: a GrowingState where it has no bound, else a DynamicMaskState."""

import torch
from torch import Tensor

from flexdma.lifespans import Selection
from flexdma.state.dynamic_mask_state import DynamicMaskState, check_bounded_state, state_options
from flexdma.state.growing import GrowingState, check_growing_state, growing_options
from flexdma.state.value import State


def empty_state(
    policy: Selection, batch_size: int, num_kv_heads: int, head_dim: int, *, dtype: torch.dtype, gate_dtype: torch.dtype,
    device: torch.device | str | None, value_dim: int | None = None, bias_dtype: torch.dtype | None = None,
) -> State:  # fmt: skip
    """The state before the first token.  Raises ValueError for a selection that has none."""
    policy.refuse_without_state()
    if policy.capacity is None:
        return GrowingState.empty(
            batch_size, num_kv_heads, head_dim, value_dim=value_dim, dtype=dtype, gate_dtype=gate_dtype,
            bias_dtype=bias_dtype, device=device, **growing_options(policy),
        )  # fmt: skip
    return DynamicMaskState.empty(
        batch_size, num_kv_heads, head_dim, value_dim=value_dim, dtype=dtype, gate_dtype=gate_dtype,
        bias_dtype=bias_dtype, device=device, **state_options(policy),
    )  # fmt: skip


def check_state_matches(
    state: object, key: Tensor, value: Tensor, gate_dtype: torch.dtype, policy: Selection,
    bias_dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Raise unless `state` fits keys [B, Hkv, n, D], values [B, Hkv, n, Dv], gates and biases of these dtypes, and `policy`.

    bias_dtype: None = a state without biases.
    """
    policy.refuse_without_state()
    if policy.capacity is None:
        check_growing_state(state, key, value, gate_dtype, growing_options(policy), bias_dtype)
    else:
        check_bounded_state(state, key, value, gate_dtype, policy, bias_dtype)
