"""What the attention layers share: a selection, its gate, the gate of the output, and the first state."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flexdma import checks
from flexdma.gates import ValueGate
from flexdma.lifespans import Selection
from flexdma.mixed_precision import autocast
from flexdma.state import State, empty_state, state_options


class KeyGates(NamedTuple):
    """What a layer's gate gives.

    gate: [B, Hkv, K], None = the layer has none.  bias: the recency, where it does not rank, else None.
    forgotten: the sum of forget gates for the next state, where it is asked for, else None.
    """

    gate: Tensor | None = None
    bias: Tensor | None = None
    forgotten: Tensor | None = None


def called_gate(
    gate: Callable[..., Any], value: Tensor, *, ranks: bool, returns_forgotten: bool = False, **options: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(gate, bias, forgotten) as in `KeyGates`, of a gate like `ValueGate` called with these options."""
    if not ranks:
        options["return_recency"] = True
    if returns_forgotten:
        options["return_forgotten"] = True
    given = gate(value, **options)
    gates, *others = given if isinstance(given, tuple) else (given,)
    return gates, None if ranks else others[0], others[-1] if returns_forgotten else None


class AttentionLayer(nn.Module):
    """The base of `DynamicMaskAttention` and `DynamicMaskLatentAttention`.

    gate: from values to gates; None where the selection does not choose by gates, which then has no parameters.
    recency_ranks: whether a recency of the gate ranks keys too, or is added to their logits alone.
    num_kv_heads: heads that choose keys of their own.
    o_proj: the output projection.  g_proj: from the layer's input to the gate of the output; None = no such gate.
    """

    gate: ValueGate
    num_kv_heads: int = 1
    o_proj: nn.Linear
    g_proj: nn.Linear

    def __init__(
        self, policy: Selection, lowering: str | None, block_size: int | tuple[int, int] | None,
        kernel_options: Mapping[str, object] | None,
    ) -> None:  # fmt: skip
        super().__init__()
        checks.one_of("lowering", lowering, (None, *checks.LOWERINGS))
        self.policy = policy
        self.lowering, self.block_size, self.kernel_options = lowering, block_size, kernel_options

    @property
    def window_size(self) -> int | tuple[int, ...] | None:
        """The window w of all heads, or of each head; None = no bound.

        It may be set between calls, for a budget that shrinks in training (`annealed_window`).  A state of another window is
        refused.  With activation checkpointing, set it after the backward: a layer that runs again has the new window.
        Neither `state_dict` nor an averaged copy of the parameters has it.
        """
        return self.policy.window_size

    @window_size.setter
    def window_size(self, window_size: int | Sequence[int] | None) -> None:
        old = self.policy
        self.policy = Selection.of(
            old.kind, window_size, old.sinks, old.recent, heads=self.num_kv_heads, threshold=old.threshold
        )

    def _make_gate(
        self, heads: int, size: int, form: str, recency: str | None, slopes: Any, recency_ranks: bool
    ) -> None:
        """Set `gate` and `recency_ranks`.  Raises ValueError where there is none, and an argument of it is given."""
        checks.recency_ranks(recency_ranks, recency)
        self.recency_ranks = recency_ranks
        if self.policy.by_gate:
            self.gate = ValueGate(heads, size, form, recency, slopes=slopes)
            return
        for name, given, default in (("form", form, "identity"), ("recency", recency, None), ("slopes", slopes, None)):
            if given != default:
                raise ValueError(
                    f"{name}: expected {default!r} with selection={self.policy.kind!r}, which has no gate, got {given!r}"
                )
        self.register_module("gate", None)

    def _make_output_gate(self, given: bool, hidden_size: int, size: int, bias: bool) -> None:
        """Set `g_proj`, last, so that the other parameters are initialised as without it."""
        if not isinstance(given, bool):
            raise TypeError(f"output_gate: expected a bool, got {given!r}")
        self.register_module("g_proj", nn.Linear(hidden_size, size, bias=bias) if given else None)

    def extra_repr(self) -> str:
        how = {"lowering": self.lowering, "block_size": self.block_size, "kernel_options": self.kernel_options}
        options = state_options(self.policy) | how
        shown = [f"{name}={value!r}" for name, value in options.items() if value not in (None, 0)]
        return ", ".join(shown if self.recency_ranks else [*shown, "recency_ranks=False"])

    def _gates(
        self, value: Tensor, key_padding_mask: Tensor | None, cu_seqlens: Tensor | None, state: State | None,
        return_state: bool,
    ) -> KeyGates:  # fmt: skip
        """The gates of keys with these values; `forgotten` with a forgetting gate and return_state."""
        if self.gate is None:
            return KeyGates()
        before: dict[str, Any] = {}
        if cu_seqlens is not None:
            before = {"cu_seqlens": cu_seqlens}
        elif state is not None:
            before = {"first_position": state.real_length, "forgotten": state.forgotten}
        returns_forgotten = return_state and self.gate.recency == "forget"
        return self._called_gate(value, key_padding_mask, returns_forgotten, **before)

    def _called_gate(
        self, value: Tensor, key_padding_mask: Tensor | None, returns_forgotten: bool, **before: Any
    ) -> KeyGates:
        """The results of `gate`, by name.  before: its arguments about earlier tokens."""
        found = called_gate(
            self.gate, value, ranks=self.recency_ranks, returns_forgotten=returns_forgotten,
            key_padding_mask=key_padding_mask, **before,
        )  # fmt: skip
        return KeyGates(*found)

    def _joined(self, output: Tensor, hidden_states: Tensor) -> Tensor:
        """Heads [B, H, N, Dv] of the attention's output -> [B, N, hidden_size]."""
        joined = output.transpose(1, 2).flatten(2)
        if self.g_proj is not None:
            joined = joined * self.g_proj(hidden_states).sigmoid().to(joined.dtype)
        return self.o_proj(joined)

    @property
    def _gate_dtype(self) -> torch.dtype:
        ranks_by_recency = self.gate is not None and self.gate.recency is not None and self.recency_ranks
        return torch.float64 if ranks_by_recency else torch.float32

    @property
    def _bias_dtype(self) -> torch.dtype | None:
        return None if self.recency_ranks else torch.float64

    def _empty_state(
        self, batch_size: int, heads: int, size: int, value_size: int, projection: nn.Module, dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> State:  # fmt: skip
        """The state before the first token.  projection: the module whose dtype keys and values have by default."""
        own = next(chain(self.parameters(), self.buffers())) if self.gate is None else self.gate.A
        if device is None and own.is_meta:
            raise ValueError(
                "device: expected the device that this layer computes on, as its weights are on meta, got None"
            )
        device = torch.device(own.device if device is None else device)
        if dtype is None:
            # Not the gate's dtype, which may be float32 in a layer of lower precision.
            dtypes = (p.dtype for p in projection.parameters() if p.is_floating_point())
            dtype = autocast(torch.empty(0, dtype=next(dtypes, own.dtype), device=device))[0].dtype
        return empty_state(
            self.policy, batch_size, heads, size, value_dim=value_size, dtype=dtype, gate_dtype=self._gate_dtype,
            bias_dtype=self._bias_dtype, device=device,
        )  # fmt: skip


def refuse_beside_sequences(**others: object) -> None:
    """Raise ValueError naming the first argument that is given; they do not go with cu_seqlens."""
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name}: expected None with cu_seqlens, got a {type(value).__name__}")
