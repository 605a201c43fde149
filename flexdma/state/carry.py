"""The keys of a state before new ones, and the state after them.

`with_state_keys` puts the keys of a state before the new ones, in order of position.  Lifespans (arXiv 2508.02124) and
lowerings then treat them as the keys of one sequence.  `state_after` keeps the keys that the next query can see.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexdma.lifespans import Lifespans, Selection, by_rank
from flexdma.lifespans.ranking import NEVER
from flexdma.lifespans.selection import document_bounds, is_above
from flexdma.opaque import realize
from flexdma.packing import along_keys
from flexdma.signatures import ScoreMod
from flexdma.state.layout import first_places, keys_at, slot_tensors

if TYPE_CHECKING:
    from flexdma.state.dynamic_mask_state import DynamicMaskState


class Keys(NamedTuple):
    """Keys in order of position: C places of a state, then n new keys; M = C + n.

    key [B, Hkv, M, D], value [B, Hkv, M, Dv], gate [B, Hkv, M], position [B, Hkv, M] int64.  Empty places of the state have
    gate -inf, position -1 and bias 0.
    key_padding_mask, document_ids: [B, M], or None where the new keys have none.
    new: n.  bias: [B, Hkv, M], or None.
    """

    key: Tensor
    value: Tensor
    gate: Tensor
    position: Tensor
    key_padding_mask: Tensor | None
    document_ids: Tensor | None
    new: int
    bias: Tensor | None = None


def of_heads(numbers: Tensor, key: Tensor) -> Tensor:
    """Gates or biases [B, 1 or Hkv, n] of keys [B, Hkv, n, D] as a state holds them: [B, Hkv, n], float32 or float64."""
    return numbers.to(torch.float64 if numbers.dtype == torch.float64 else torch.float32).expand(key.shape[:3])


def first_keys(
    key: Tensor, value: Tensor, gate: Tensor, key_padding_mask: Tensor | None, document_ids: Tensor | None,
    bias: Tensor | None = None,
) -> Keys:  # fmt: skip
    """The keys of a call without a state."""
    position = torch.arange(key.shape[2], device=key.device).expand(key.shape[:3])
    document_ids = None if document_ids is None else document_ids.long()
    return Keys(key, value, gate, position, key_padding_mask, document_ids, key.shape[2], bias)


def with_state_keys(
    state: "DynamicMaskState",
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    key_padding_mask: Tensor | None,
    document_ids: Tensor | None,
    bias: Tensor | None = None,
) -> Keys:
    """The keys of the state, then key [B, Hkv, n, D], value, gate and bias [B, Hkv, n].  O(C log C + n) time."""
    place = _places(state)
    held = place >= 0
    slot = place.clamp(min=0)
    arrivals = state.length[:, None, None] + torch.arange(key.shape[2], device=key.device)
    batch, heads, capacity = place.shape
    if key_padding_mask is not None:
        key_padding_mask = pad(key_padding_mask, (capacity, 0), value=True)
    if document_ids is not None:
        document_ids = torch.cat([state.document[:, None].expand(-1, capacity), document_ids.long()], 1)
    return Keys(
        torch.cat([along_keys(state.key, slot), key], 2),
        torch.cat([along_keys(state.value, slot), value], 2),
        torch.cat([along_keys(state.gate, slot).masked_fill(~held, float("-inf")), gate], 2),
        torch.cat([along_keys(state.position, slot).masked_fill(~held, -1), arrivals.expand(batch, heads, -1)], 2),
        key_padding_mask,
        document_ids,
        key.shape[2],
        None if bias is None or state.bias is None
        else torch.cat([along_keys(state.bias, slot).masked_fill(~held, 0.0), bias], 2),
    )  # fmt: skip


def _places(state: "DynamicMaskState") -> Tensor:
    """[B, Hkv, C]: the slot of the key at each place before the new keys; -1 for an empty place.

    Keys are in order of position.  The last n places belong to the last n positions, with or without a key, for the n that
    are visible because they are the last.
    """
    position, capacity, last = state.position, state.position.shape[-1], state.policy.last_positions
    back = state.length[:, None, None] - position  # 1 = the last token
    old = (position >= 0) & (back > last)
    by_age = torch.where(old, position, NEVER).argsort(-1)
    ordinal = torch.arange(capacity, device=position.device)
    rank = torch.zeros_like(by_age).scatter(-1, by_age, ordinal.expand_as(by_age))
    place = torch.where(old, rank, torch.where(position >= 0, capacity - back, capacity))
    slots = torch.full((*position.shape[:-1], capacity + 1), -1, device=position.device)
    return slots.scatter(-1, place, ordinal.expand_as(place))[..., :capacity]


def state_after(state: "DynamicMaskState", keys: Keys, lifespans: Lifespans | None) -> "DynamicMaskState":
    """The state after these keys.  O(M) time, without lifespans O(M log M).

    state: the state before them, for its options, length and last positions.
    lifespans: of `keys`; None = not computed, and last_loss is the last position, so that `crop` refuses.
    """
    total = keys.gate.shape[-1]
    real = keys.gate != float("-inf")
    if keys.key_padding_mask is not None:
        real = real & keys.key_padding_mask[:, None]
    length = state.length + keys.new
    if lifespans is None:
        last_loss = (length - 1)[:, None].expand_as(state.last_loss).contiguous()
    else:
        last_loss = _last_loss(state, lifespans, total, keys.new)
    document = state.document
    if keys.document_ids is not None:
        # A copy: the caller may overwrite the ids, and torch.compile would guard the strides of a view.
        document = keys.document_ids[:, -1].clone(memory_format=torch.contiguous_format)
        real = real & (document_bounds(keys.document_ids)[0][..., -1:] <= torch.arange(total, device=real.device))
    is_sink = real & (real.cumsum(-1) <= state.sinks)
    last_sink = torch.where(is_sink, keys.position, -1).amax(-1)
    real_length, last_padding = state.real_length + keys.new, state.last_padding
    if keys.key_padding_mask is not None:
        seen = keys.key_padding_mask[:, total - keys.new :]
        real_length, last_padding = state.real_length + seen.sum(-1), _last_padding(state, seen)
    return kept(
        replace(
            state,
            length=length,
            real_length=real_length,
            last_padding=last_padding,
            document=document,
            last_sink=last_sink,
            last_loss=last_loss,
        ),
        keys,
        seen_by_last(state.policy, keys, real, is_sink, length) if lifespans is None else lifespans.death == total,
    )


def seen_by_last(policy: Selection, keys: Keys, real: Tensor, is_sink: Tensor, length: Tensor) -> Tensor:
    """[B, Hkv, M] bool: which of the `real` keys the query at position length - 1 sees.  length: [B]."""
    age = length[:, None, None] - keys.position  # 1 = the last token
    windows, is_recent = policy.windows(real.device), age <= policy.recent
    others = real & ~is_sink & ~is_recent
    if policy.kind == "sliding":
        in_top = others & (age <= policy.recent + windows)
    else:
        if policy.kind == "threshold":
            others = others & is_above(keys.gate, policy.threshold)
        ranked = by_rank(keys.gate.detach().masked_fill(~others, float("-inf")))
        places = torch.arange(real.shape[-1], device=real.device).expand(real.shape)
        in_top = others & (torch.empty_like(places).scatter(-1, ranked, places) < windows)
    return in_top | (real & (is_sink | is_recent))


def kept(state: "DynamicMaskState", keys: Keys, seen: Tensor) -> "DynamicMaskState":
    """`state` with the keys `seen` [B, Hkv, M] bool, at most C of each head, in order."""
    place = first_places(seen, state.position.shape[-1])
    return replace(state, **keys_at(place, slot_tensors(keys)))


def _last_padding(state: "DynamicMaskState", key_padding_mask: Tensor) -> Tensor:
    """[B]: the latest padded position among the tokens of the state and those of this mask [B, n]; -1 for none."""
    position = state.length[:, None] + torch.arange(key_padding_mask.shape[1], device=key_padding_mask.device)
    return torch.where(key_padding_mask, state.last_padding[:, None], position).amax(-1)


def _last_loss(state: "DynamicMaskState", lifespans: Lifespans, total: int, new: int) -> Tensor:
    """[B, Hkv]: the latest position whose arrival evicted a visible key, before the state or since."""
    held = total - new
    ended = (lifespans.birth < lifespans.death) & (lifespans.death < total) & (lifespans.death >= held)
    latest = torch.where(ended, lifespans.death.long() - held, -1).amax(-1)
    return torch.where(latest >= 0, state.length[:, None] + latest, state.last_loss)


def score_mod_at_positions(score_mod: ScoreMod, keys: Keys, length: Tensor, group: int) -> ScoreMod:
    """A score_mod that maps places among `keys` to positions and calls `score_mod`.

    length: [B], of the state before them.
    """
    held = keys.position.shape[-1] - keys.new
    # Buffers, because Inductor's C++ FlexAttention captures no views and no expressions.  Empty places get position 0, so
    # score_mod never sees -1.
    key_position, shift = realize(keys.position.clamp(min=0)), realize(length - held)

    def at_position(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score_mod(score, b, h, shift[b] + i, key_position[b, h // group, j])

    return at_position
