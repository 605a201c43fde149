"""DynamicMaskState: the keys that later queries can still see.

After any prefix of a causal running top-w ("Trainable Dynamic Mask Sparse Attention", arXiv 2508.02124) later queries can
see only the w keys that are visible now, the sinks and the recent keys.  So

    (state, new tokens) -> (output, new state)

is decoding with one new token and chunked prefill with many.  Both equal one pass over all tokens; the tests check this with
ties, sinks, recent keys, padding and documents.  SparseK (arXiv 2406.16747) and later trained evictions bound a cache in the
same way.

A state is a value: nothing changes it in place unless it is donated, so callers can keep it, branch from it and differentiate
through it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from flexdma.lifespans import STATEFUL_SELECTIONS, Selection
from flexdma.state.layout import empty_tensors, refuse_difference, refuse_sizes, state_layout
from flexdma.state.rollback import cropped
from flexdma.state.value import State, register

if TYPE_CHECKING:
    from flexdma.state.token_run import TokenRun


@register
@dataclass(frozen=True, eq=False)
class DynamicMaskState(State):
    """The state that `dynamic_mask_attention(..., state=..., return_state=True)` takes and returns; `empty` makes the first.

    C = w + sinks + recent slots per KV head, w the widest window.  They hold keys in any order: sinks have positions up to
    `last_sink`, recent keys those from length - recent on, and the others are the top-w.  The key and value of an empty slot
    are 0.

    key, value, gate, position, length, real_length, last_padding, document, last_sink, last_loss, forgotten, bias: see
        `State`.
    window_size, sinks, recent, selection: of the operator.
    """

    window_size: int | tuple[int, ...]
    sinks: int = 0
    recent: int = 0
    selection: str = "causal"
    # Not a field: the run that made this state, if decoding on a CPU did.
    _run: ClassVar["TokenRun | None"] = None

    @classmethod
    def empty(
        cls,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        window_size: int | Sequence[int],
        *,
        value_dim: int | None = None,
        sinks: int = 0,
        recent: int = 0,
        selection: str = "causal",
        dtype: torch.dtype = torch.float32,
        gate_dtype: torch.dtype = torch.float32,
        bias_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "DynamicMaskState":
        """The state before the first token.

        batch_size, num_kv_heads, head_dim, value_dim: B, Hkv, D and Dv (default D).
        window_size, sinks, recent, selection: as in `dynamic_mask_attention`; selection is not "global" or "full".
        dtype: of keys and values.  gate_dtype: float64 for float64 gates (those with a recency), float32 for all others.
        bias_dtype: of biases, as gate_dtype; None = a state without them.
        Raises ValueError or TypeError naming the argument.
        """
        value_dim = head_dim if value_dim is None else value_dim
        refuse_sizes(batch_size, num_kv_heads, head_dim, value_dim, dtype, gate_dtype, bias_dtype)
        policy = Selection.of(selection, window_size, sinks, recent, heads=num_kv_heads, kinds=STATEFUL_SELECTIONS)
        policy.refuse_without_bound("in a DynamicMaskState")
        slots = (batch_size, num_kv_heads, cast(int, policy.capacity))
        layout = state_layout(slots, head_dim, value_dim, dtype, gate_dtype, bias_dtype)
        return cls(**empty_tensors(layout, device), **state_options(policy))

    @property
    def policy(self) -> Selection:
        """The options as one value."""
        return Selection(self.selection, self.window_size, self.sinks, self.recent)

    @property
    def widest(self) -> int:
        """w, the largest window: the number of slots for the top-w."""
        return self.position.shape[-1] - self.sinks - self.recent

    def crop(self, tokens: int | Tensor) -> "DynamicMaskState":
        """The state before the last `tokens` tokens, one int or one per sequence [B] int64.

        Raises ValueError where a visible key has been evicted since, where one of these tokens is padded, and with forget
        gates; take a `checkpoint()` first in these cases.  By a causal choice nothing is evicted while there is one document
        of no more than w + sinks + recent tokens, w the narrowest window.  Synchronises with the device.
        """
        return cropped(self, tokens)


def check_bounded_state(
    state: object,
    key: Tensor,
    value: Tensor,
    gate_dtype: torch.dtype,
    policy: Selection,
    bias_dtype: torch.dtype | None,
) -> None:
    """Raise unless `state` fits keys [B, Hkv, n, D], values [B, Hkv, n, Dv], gates and biases of these dtypes, `policy`."""
    if not isinstance(state, DynamicMaskState):
        raise TypeError(f"state: expected a DynamicMaskState, got {type(state).__name__}")
    batch, heads, _keys, size = key.shape
    slots = (batch, heads, cast(int, policy.capacity))
    layout = state_layout(slots, size, value.shape[3], key.dtype, gate_dtype, bias_dtype)
    refuse_difference("state", state, layout, state_options(policy), key.device)


def state_options(policy: Selection) -> dict[str, Any]:
    """The options of a state with this selection, by name."""
    return {
        "window_size": policy.window_size, "sinks": policy.sinks, "recent": policy.recent, "selection": policy.kind
    }  # fmt: skip
