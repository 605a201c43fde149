"""The record of one layer's forward pass, from which an exact rollback computes the state after any of its tokens."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexdma.attention import dynamic_mask_attention
from flexdma.attention_layer import called_gate
from flexdma.state import State
from flexdma.state.token_run import TokenRun


@dataclass(frozen=True, eq=False)
class RecordedPass:
    """The inputs of a pass of n tokens.

    state: before the pass; None before the first token.  length: number of tokens before the pass.
    key [B, Hkv, n, D], value [B, Hkv, n, Dv].
    gates, bias [B, Hkv, n]: kept because a rollback runs outside of the layer's forward, where `gate` may have no weights.
    gate: the function from values to gates.  dtype: of keys and values in a state.  options: of `dynamic_mask_attention`.
    """

    state: State | None
    length: int
    key: Tensor
    value: Tensor
    gates: Tensor
    bias: Tensor | None
    gate: Callable[..., Any]
    dtype: torch.dtype
    options: dict[str, Any]

    def state_after(self, tokens: int) -> State | None:
        """The state after the first `tokens` tokens of the pass."""
        if tokens == 0:
            return self.state
        key, value, gates = self.key[:, :, :tokens], self.value[:, :, :tokens], self.gates[:, :, :tokens]
        bias = None if self.bias is None else self.bias[:, :, :tokens]
        masks = {name: self.options[name] for name in ("key_padding_mask", "document_ids")}
        masks = {name: None if mask is None else mask[:, :tokens] for name, mask in masks.items()}
        # The output is not used, so one query is enough.
        _, after = dynamic_mask_attention(
            key[:, :, -1:].to(self.dtype), key.to(self.dtype), value.to(self.dtype), gates,
            bias=bias, state=self.state, return_state=True, **(self.options | masks),
        )  # fmt: skip
        if forgets(self.gate):
            found = gated(self.gate, value, self.state, masks["key_padding_mask"])
            after = replace(after, forgotten=found.forgotten)
        return after


class Gated(NamedTuple):
    """What a gate gives for n tokens.

    gates: [B, Hkv, n].  bias: [B, Hkv, n], the recency, where it does not rank, else None.
    forgotten: the running sum after these tokens, [B, Hkv], of gates that have one, else None.
    """

    gates: Tensor
    bias: Tensor | None
    forgotten: Tensor | None


def forgets(gate: Callable[..., Any]) -> bool:
    """Whether this gate has a running sum, which a state keeps."""
    return getattr(gate, "recency", None) == "forget"


def gated(
    gate: Callable[..., Any], value: Tensor, before: State | TokenRun | None, key_padding_mask: Tensor | None, *,
    keeps_sum: bool = True,
) -> Gated:  # fmt: skip
    """The gates of values that follow a state or run; None = of the first values.

    keeps_sum: whether a next pass needs the running sum; False = `forgotten` is None.
    """
    arguments: dict[str, Any] = {"key_padding_mask": key_padding_mask}
    # A gate without recency reads neither.
    if before is not None and getattr(gate, "recency", "") is not None:
        arguments |= {"first_position": before.real_length, "forgotten": before.forgotten}
    ranks = getattr(gate, "recency_ranks", True)
    return Gated(*called_gate(gate, value, ranks=ranks, returns_forgotten=keeps_sum and forgets(gate), **arguments))
