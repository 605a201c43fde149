"""Keys and queries on one timeline, which turns any lifespans into those of keys born at their own positions.

A query block of gather attends to its own keys, one for each position, and to the keys alive before it.  Where births are
not positions, this module puts keys and queries in one row of K + Q slots: queries in order, and each key right before the
first query that sees it.  A key is then born at its own slot and dies after the slot of its last query.

    birth = [0 0 1 1], death = [1 2 2 2], Q = K = 4          slot    0 1 2 3 4 5 6 7
                                                             key     0 1   2 3
                                                             query       0     1 2 3

Each query sees the same keys as before, so the capacity is the same.  Attention computes K + Q rows; where it can read the
device, only those from the first query on.  Keys with P intervals have a slot for each: P K + Q slots, of which P read the
same key.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexdma.lifespans import Lifespans
from flexdma.lifespans.terms import terms_per_key
from flexdma.lifespans.visible import births_are_positions, seen_by_queries, without_unseen
from flexdma.lowerings.plain import plain_attend
from flexdma.packing import along_keys
from flexdma.packing.counting import count_up_to
from flexdma.signatures import ScoreMod
from flexdma.transforms import can_read


class Timeline(NamedTuple):
    """T slots, one for each term and each query; [B, H] are those of the lifespans.

    key: [B, H, T] int64, the term at a slot (the key, where P = 1); an arbitrary valid key at the slots of queries.
    query: [B, H, T] int64, the query at a slot; at the slots of keys the next query, or the last one if there is none.
    slot: [B, H, Q] int64, the slots of the queries.
    death: [B, H, T] int32, one past the slot of the last query that sees the key; the slot itself for keys that are never
        seen and for the slots of queries.
    """

    key: Tensor
    query: Tensor
    slot: Tensor
    death: Tensor


def timeline(lifespans: Lifespans, queries: int) -> Timeline:
    """The timeline of terms with lifespans [B, H, P K] and the last `queries` of the P K positions.  O(P K log P K) time."""
    born, dies = seen_by_queries(lifespans, queries)
    keys = born.shape[-1]
    never = dies <= born
    # Keys that no query sees come first, before all queries.
    entry, order = torch.where(never, -1, born).sort(dim=-1, stable=True)
    numbers = torch.arange(queries, dtype=entry.dtype, device=entry.device).expand(*entry.shape[:-1], -1).contiguous()
    slot = numbers + count_up_to(entry, numbers)
    slots = torch.arange(keys + queries, device=entry.device).expand(*entry.shape[:-1], -1).contiguous()
    query = count_up_to(slot, slots - 1).clamp(max=queries - 1)
    key_slot = torch.arange(keys, device=entry.device) + entry.clamp(min=0)
    last = slot.gather(-1, (dies.gather(-1, order) - 1).clamp(min=0).long())
    death = torch.where(never.gather(-1, order), key_slot, last + 1)
    return Timeline(
        torch.zeros_like(slots).scatter(-1, key_slot, order),
        query,
        slot,
        slots.scatter(-1, key_slot, death).int(),
    )


def attend_any_births(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    reference: Tensor,
    lifespans: Lifespans,
    score_mod: ScoreMod | None,
    *,
    in_order: bool | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`plain_attend` for terms of any births: bias [B, Hkv, P K], lifespans [B, H, P K], reference [B, Hkv, Q].

    in_order: whether P = 1 and each key that is ever visible is born at its own position; None = not known.
    options: of `plain_attend`.
    Where it can read the device, it uses the timeline only where needed and without the slots before the first query.
    """
    heads, keys = key.shape[1:3]
    queries, group = query.shape[2], query.shape[1] // heads
    each = terms_per_key(bias, key)
    if in_order is None:
        in_order = each == 1 and can_read(query) and births_are_positions(lifespans)
    if in_order:
        lifespans = without_unseen(lifespans, queries)
        return plain_attend(query, key, value, bias, reference, lifespans, score_mod, **options)
    line = Timeline(*(tensor.expand(*key.shape[:2], -1) for tensor in timeline(lifespans, queries)))
    start = int(line.slot[..., 0].min()) if can_read(query) and line.slot.numel() else 0
    rows = line.query[..., start:]
    slots = torch.arange(line.key.shape[-1], dtype=torch.int32, device=key.device)
    position = line.key if each == 1 else line.key.div(each, rounding_mode="floor")
    output, log_sum = plain_attend(
        _per_group(query, rows, group),
        along_keys(key, position),
        along_keys(value, position),
        along_keys(bias, line.key),
        along_keys(reference, rows),
        Lifespans(slots.expand_as(line.death), line.death),
        None if score_mod is None else _score_mod_at_slots(score_mod, line.query + keys - queries, position, group),
        **options,
    )
    slot = line.slot - start
    return _per_group(output, slot, group), None if log_sum is None else _per_group(log_sum, slot, group)


def _score_mod_at_slots(score_mod: ScoreMod, query_position: Tensor, key_position: Tensor, group: int) -> ScoreMod:
    """A score_mod that maps slots of the timeline to positions [B, Hkv, slots] and calls `score_mod`."""

    def at_slot(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score_mod(score, b, h, query_position[b, h // group, i], key_position[b, h // group, j])

    return at_slot


def _per_group(tensor: Tensor, order: Tensor, group: int) -> Tensor:
    """[B, Hq, n, ...] at order [B, Hkv, m] -> [B, Hq, m, ...]."""
    rows = tensor.unflatten(1, (order.shape[1], group)).transpose(2, 3)  # [B, Hkv, n, G, ...]
    return along_keys(rows, order).transpose(2, 3).flatten(1, 2)
