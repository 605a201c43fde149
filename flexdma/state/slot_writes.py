"""Decoding on a CPU without derivatives: one token writes only the slots that it changes, in place.

The code reads values.  `TokenRun` computes plain tokens.  Every other case (a gate that is not finite, a new sink,
padding, the first token of a document) is computed by the operations of `one_token.py`.

Inside `torch.compile` values cannot be read, and the operations of `one_token.py` are fused to fewer than this file calls.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flexdma.state.cpu_attention import attention_of_one
from flexdma.state.dynamic_mask_state import DynamicMaskState
from flexdma.state.layout import slot_tensors
from flexdma.state.one_query import attended, logit_bias
from flexdma.state.one_token import in_document, inserted
from flexdma.state.token_run import run_of


def decode_in_place(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    state: DynamicMaskState,
    *,
    bias: Tensor | None,
    scale: float,
    key_padding_mask: Tensor | None,
    document_ids: Tensor | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, DynamicMaskState]:
    """Attention of one new token, and the state after it, whose slots are those of `state`, overwritten.

    Arguments as of `decode`.  The other tensors of the state do not change.
    """
    # A copy: the caller may overwrite the ids.
    ids = None if document_ids is None else document_ids[:, 0].to(torch.int64, copy=True)
    if ids is not None and not torch.equal(ids, state.document):
        after = copied_into(state, inserted(in_document(state, ids), key, value, gate, key_padding_mask, bias=bias))
    else:
        is_plain = key_padding_mask is None or bool(key_padding_mask.all())
        run = run_of(state) if is_plain else None
        if run is not None and run.insert(key, value, gate, bias):
            now, after = state.length, run.state()
            after = after if ids is None else after._with(document=ids)
            if sink_logits is None:
                return run.attention(query, scale), after
            return attended(query, now, after, scale, None, sink_logits), after
        after = inserted(state, key, value, gate, key_padding_mask, bias=bias, in_place=True)
    if ids is not None:
        after = after._with(document=ids)
    output = None if sink_logits is not None else _attended(query, after, scale)
    if output is None:
        output = attended(query, state.length, after, scale, None, sink_logits)
    return output, after


def copied_into(state: DynamicMaskState, after: DynamicMaskState) -> DynamicMaskState:
    """`after`, with its slots copied into those of `state`."""
    slots: dict[str, Any] = slot_tensors(state)
    for name, tensor in slots.items():
        tensor.copy_(getattr(after, name))
    return replace(after, **slots)


def _attended(query: Tensor, state: DynamicMaskState, scale: float) -> Tensor | None:
    """Attention of the query to the keys of the state; None where a best bias is not finite, or a row sees no key."""
    added = logit_bias(state)
    best = added.amax(-1, keepdim=True)
    if not math.isfinite(best.sum().item()):
        return None
    return attention_of_one(query, state.key, state.value, (added - best).unsqueeze(2), scale)
