"""The states of sequences packed into one row, each after its last token.

A query after the end of a sequence sees the keys that its last query saw ("Trainable Dynamic Mask Sparse Attention", arXiv
2508.02124), which are the keys whose lifespans reach that end.  So only C keys of each sequence are gathered.
"""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from flexdma.lifespans import Lifespans, Selection
from flexdma.sequences import Sequences
from flexdma.state.dynamic_mask_state import DynamicMaskState, state_options
from flexdma.state.layout import keys_at


def states_after(
    key: Tensor, value: Tensor, gate: Tensor, lifespans: Lifespans, sequences: Sequences, policy: Selection,
    bias: Tensor | None = None,
) -> DynamicMaskState:  # fmt: skip
    """The state of batch size S after each sequence's last token.  O(T + S C) time.

    key [1, Hkv, T, D], value [1, Hkv, T, Dv], gate and bias [1, Hkv, T] float32 or float64, bias None = none; lifespans
    [1, Hkv, T] of `policy`, whose documents are the sequences.
    """
    count, heads, capacity = sequences.cu_seqlens.shape[0] - 1, key.shape[1], cast(int, policy.capacity)
    first = sequences.cu_seqlens[:-1, None, None]
    token = _last_keys(lifespans, sequences, count, capacity)  # [1, Hkv, S C]
    tensors = {"key": key, "value": value, "gate": gate} | ({} if bias is None else {"bias": bias})

    def of_sequences(tensor: Tensor) -> Tensor:
        """[1, Hkv, S C, ...] -> [S, Hkv, C, ...], contiguous, because only such slots can be donated."""
        return tensor[0].unflatten(1, (count, capacity)).transpose(0, 1).contiguous()

    held = of_sequences(token >= 0)
    position = torch.where(held, of_sequences(token) - first, -1)
    is_sink = held & (held.cumsum(-1) <= policy.sinks)
    empty = DynamicMaskState.empty(
        count, heads, key.shape[3], value_dim=value.shape[3], dtype=key.dtype, gate_dtype=gate.dtype,
        bias_dtype=None if bias is None else bias.dtype, device=key.device, **state_options(policy),
    )  # fmt: skip
    slots: dict[str, Any] = {name: of_sequences(tensor) for name, tensor in keys_at(token, tensors).items()}
    return replace(
        empty,
        **slots,
        position=position,
        length=sequences.cu_seqlens.diff(),
        real_length=sequences.cu_seqlens.diff(),
        last_sink=torch.where(is_sink, position, -1).amax(-1),
        last_loss=_last_losses(lifespans, sequences, count),
    )


def _last_keys(lifespans: Lifespans, sequences: Sequences, count: int, capacity: int) -> Tensor:
    """[1, H, S C] int64: for each sequence the tokens whose lifespans reach its end, in order; -1 for none."""
    birth, death = lifespans
    last = (death > birth) & (death == sequences.cu_seqlens[1:][sequences.number])
    before = last.cumsum(-1) - last.long()
    before = before - before.gather(-1, sequences.start.expand_as(before))
    # One extra cell collects the other tokens.
    cell = torch.where(last, sequences.number * capacity + before, count * capacity)
    tokens = torch.arange(death.shape[-1], device=death.device).expand_as(cell)
    cells = torch.full((*death.shape[:-1], count * capacity + 1), -1, device=death.device)
    return cells.scatter(-1, cell, tokens)[..., :-1]


def _last_losses(lifespans: Lifespans, sequences: Sequences, count: int) -> Tensor:
    """[S, H] int64: in each sequence the latest position whose arrival evicted a visible key; -1 for none."""
    birth, death = lifespans
    ended = (death > birth) & (death < sequences.cu_seqlens[1:][sequences.number])
    position = torch.where(ended, death - sequences.start, -1)
    latest = torch.full((*death.shape[:-1], count), -1, device=death.device)
    return latest.scatter_reduce(-1, sequences.number.expand_as(position), position, "amax")[0].T.contiguous()
