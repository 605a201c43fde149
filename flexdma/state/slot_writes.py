"""Decoding on a CPU without derivatives: one token writes only the slots that it changes, in place.

The code reads values.  Once the window is full, a token does nothing where its gate is below every kept gate, and otherwise
replaces one slot per head.  Every other case (an empty slot, NaN, a sink that leaves the window, recent tokens, padding, the
first token of a document) is computed by the operations of `one_token.py`.

Inside `torch.compile` values cannot be read, and the operations of `one_token.py` are fused to fewer than this file calls.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexdma.lifespans.ranking import NEVER
from flexdma.mixed_precision import without_autocast
from flexdma.state.dynamic_mask_state import DynamicMaskState
from flexdma.state.layout import SLOTS
from flexdma.state.one_token import attended, beyond_window, in_document, inserted


def decode_in_place(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    state: DynamicMaskState,
    *,
    scale: float,
    key_padding_mask: Tensor | None,
    document_ids: Tensor | None,
    sink_logits: Tensor | None,
) -> tuple[Tensor, DynamicMaskState]:
    """Attention of one new token, and the state after it, whose slots are those of `state`, overwritten.

    Arguments as of `decode`.  The other tensors of the state do not change.
    """
    now, after = state.length, None
    # A copy: the caller may overwrite the ids.
    ids = None if document_ids is None else document_ids[:, 0].to(torch.int64, copy=True)
    if ids is not None and not torch.equal(ids, state.document):
        after = copied_into(state, inserted(in_document(state, ids), key, value, gate, key_padding_mask))
    elif key_padding_mask is None or bool(key_padding_mask.all()):
        after = _replaced(state, key, value, gate)
    if after is None:
        after = inserted(state, key, value, gate, key_padding_mask, in_place=True)
    if ids is not None:
        after = replace(after, document=ids)
    output = None if sink_logits is not None else _attended(query, after, scale)
    if output is None:
        output = attended(query, now, after, scale, None, sink_logits)
    return output, after


def copied_into(state: DynamicMaskState, after: DynamicMaskState) -> DynamicMaskState:
    """`after`, with its slots copied into those of `state`."""
    for name in SLOTS:
        getattr(state, name).copy_(getattr(after, name))
    return replace(after, **{name: getattr(state, name) for name in SLOTS})


def _replaced(state: DynamicMaskState, key: Tensor, value: Tensor, gate: Tensor) -> DynamicMaskState | None:
    """The state after one key of the same document, where it replaces one key per head or none; None in other cases.

    Python compares the few numbers per head, because each tensor operation on them would take longer.
    """
    widest, size = state.widest, state.position.shape[-1]
    if state.recent or widest < state.sinks:
        return None
    level = state.gate if widest == size else state.gate[..., :widest]
    if isinstance(state.window_size, tuple):
        level = level.masked_fill(beyond_window(state), math.inf)
    weakest = level.amin(-1, keepdim=True)
    lowest, new = weakest.view(-1).tolist(), gate.reshape(-1).tolist()
    if not math.isfinite(sum(lowest)):  # an empty slot or NaN
        return None
    threshold = state.policy.threshold if state.selection == "threshold" else -math.inf
    # A NaN enters: each comparison with it is False.
    rows = [
        row
        for row, (low, number) in enumerate(zip(lowest, new, strict=True))
        if not (low > number or number <= threshold)
    ]
    last_loss = state.last_loss
    if rows:
        position = state.position if widest == size else state.position[..., :widest]
        oldest, slots = (t.view(-1).tolist() for t in torch.where(level == weakest, position, NEVER).min(-1))
        if state.sinks:
            last_sink = state.last_sink.view(-1).tolist()
            if any(oldest[row] <= last_sink[row] for row in rows):
                return None
        length = state.length.tolist()
        now = [length[row // key.shape[1]] for row in rows]
        _write(state, rows, [row * size + slots[row] for row in rows], key, value, gate, now)
        losses = last_loss.view(-1).tolist()
        for row, position_now in zip(rows, now, strict=True):
            losses[row] = position_now
        last_loss = torch.tensor(losses).view(last_loss.shape)
    return replace(state, length=state.length + 1, real_length=state.real_length + 1, last_loss=last_loss)


def _write(
    state: DynamicMaskState, rows: list[int], slots: list[int], key: Tensor, value: Tensor, gate: Tensor, now: list[int]
) -> None:
    """Write the keys of some rows of [B Hkv] to slots of [B Hkv C]."""
    slot = torch.tensor(slots)
    some = None if len(rows) == gate.numel() else torch.tensor(rows)
    for held, new in ((state.key, key), (state.value, value), (state.gate, gate)):
        new = new.reshape(-1, *held.shape[3:])
        held.view(-1, *held.shape[3:]).index_copy_(0, slot, new if some is None else new.index_select(0, some))
    state.position.view(-1).index_copy_(0, slot, torch.tensor(now))


def _attended(query: Tensor, state: DynamicMaskState, scale: float) -> Tensor | None:
    """Attention of the query to the keys of the state; None where a gate is not finite, or a row sees no key."""
    best = state.gate.amax(-1, keepdim=True)
    if not math.isfinite(best.sum().item()):
        return None
    batch, heads = state.position.shape[:2]
    query_heads, size = query.shape[1], query.shape[3]
    computed = torch.float64 if query.dtype == torch.float64 else torch.float32
    bias = (state.gate - best).unsqueeze(2)  # [B, Hkv, 1, C]
    rows, keys, values = query.reshape(batch, heads, query_heads // heads, size), state.key, state.value
    if bias.dtype != computed or rows.dtype != computed:
        bias, rows, keys, values = (tensor.to(computed) for tensor in (bias, rows, keys, values))
    with without_autocast(query.device):
        output = scaled_dot_product_attention(rows, keys, values, attn_mask=bias, scale=scale)
    output = output.reshape(batch, query_heads, 1, values.shape[3])
    return output if output.dtype == query.dtype else output.to(query.dtype)
