"""Runs of tokens, each read alone, and the state after two of them that follow one another.

Joining is associative, so the states before all parts of a sequence are a prefix scan over the parts, as for linear
recurrences (Blelloch, "Prefix Sums and Their Applications", 1990).  It is exact: a key that has lost its place to w keys of
its own run, none of them a sink or recent there, has lost it to them in the joined run too ("Trainable Dynamic Mask Sparse
Attention", arXiv 2508.02124), and the first `sinks` and the last `recent` keys of the joined run are among those of its two
parts.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from flexdma.lifespans import Selection
from flexdma.packing import along_keys
from flexdma.state.carry import Keys, first_keys, kept, seen_by_last, state_after
from flexdma.state.dynamic_mask_state import DynamicMaskState, state_options


class Run(NamedTuple):
    """Some tokens that follow one another.

    state: after them, as if they were the first of the sequence.
    one_document: [B] bool, whether they all have the same document id, or are none.
    """

    state: DynamicMaskState
    one_document: Tensor


def run_of(
    key: Tensor, value: Tensor, gate: Tensor, policy: Selection, key_padding_mask: Tensor | None,
    document_ids: Tensor | None, bias: Tensor | None = None,
) -> Run:  # fmt: skip
    """The run of these tokens, of key [B, Hkv, n, D], value [B, Hkv, n, Dv], gate, bias [B, Hkv, n] in float32 or float64."""
    keys = first_keys(key, value, gate, key_padding_mask, document_ids, bias)
    before = empty_run(key, value, gate, policy, bias)
    if document_ids is None:
        return Run(state_after(before.state, keys, None), before.one_document)
    return Run(state_after(before.state, keys, None), (document_ids == document_ids[:, :1]).all(-1))


def empty_run(key: Tensor, value: Tensor, gate: Tensor, policy: Selection, bias: Tensor | None = None) -> Run:
    """The run of no tokens; arguments as of `run_of`."""
    batch, heads, _keys, size = key.shape
    state = DynamicMaskState.empty(
        batch, heads, size, value_dim=value.shape[3], dtype=key.dtype, gate_dtype=gate.dtype,
        bias_dtype=None if bias is None else bias.dtype, device=key.device, **state_options(policy),
    )  # fmt: skip
    return Run(state, torch.ones(batch, dtype=torch.bool, device=key.device))


def joined(first: Run, second: Run) -> Run:
    """The run of the tokens of `first`, then those of `second`.  Differentiable in keys, values, gates and biases.

    last_loss is the last position, because lost keys were not counted: `crop` refuses to go back into the joined run.
    `forgotten` is that of `second`.  O(C log C) time.
    """
    earlier, later = first.state, second.state
    is_none = later.length == 0
    goes_on = second.one_document & (is_none | (earlier.length == 0) | (earlier.document == later.document))
    start = earlier.length[:, None, None]
    position = torch.cat([earlier.position, torch.where(later.position >= 0, later.position + start, -1)], -1)
    order = position.argsort(-1)  # empty places come first
    position = position.gather(-1, order)

    def in_order(name: str) -> Tensor:
        return along_keys(torch.cat([getattr(earlier, name), getattr(later, name)], 2), order)

    length = earlier.length + later.length
    real = (position >= 0) & (goes_on[:, None, None] | (position >= start))
    is_sink = real & (real.cumsum(-1) <= earlier.sinks)
    padding = torch.where(later.last_padding >= 0, later.last_padding + earlier.length, earlier.last_padding)
    state = replace(
        later,
        length=length,
        real_length=earlier.real_length + later.real_length,
        last_padding=padding,
        document=torch.where(is_none, earlier.document, later.document),
        last_sink=torch.where(is_sink, position, -1).amax(-1),
        last_loss=(length - 1)[:, None].expand_as(later.last_loss).contiguous(),
    )
    keys = Keys(
        in_order("key"), in_order("value"), in_order("gate"), position, None, None, new=later.position.shape[-1],
        bias=None if later.bias is None else in_order("bias"),
    )  # fmt: skip
    seen = seen_by_last(state.policy, keys, real, is_sink, length)
    return Run(kept(state, keys, seen), first.one_document & goes_on)
