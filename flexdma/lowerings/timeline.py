"""Keys and queries on one timeline, which turns any lifespans into those of keys born at their own positions.

A query block of gather attends to its own keys, one for each position, and to the keys alive before it.  Where births are
not positions, this module puts keys and queries in one row of K + Q slots: queries in order, and each key right before the
first query that sees it.  A key is then born at its own slot and dies after the slot of its last query.

    birth = [0 0 1 1], death = [1 2 2 2], Q = K = 4          slot    0 1 2 3 4 5 6 7
                                                             key     0 1   2 3
                                                             query       0     1 2 3

Each query sees the same keys as before, so the capacity is the same.  Attention computes K + Q rows; where it can read the
device, only those from the first query on.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexdma.lifespans import Lifespans
from flexdma.lifespans.visible import births_are_positions, seen_by_queries
from flexdma.lowerings.reference_gate import biases
from flexdma.packing import along_keys
from flexdma.packing.counting import count_up_to
from flexdma.signatures import ScoreMod


class Timeline(NamedTuple):
    """T = K + Q slots; [B, H] are those of the lifespans.

    key: [B, H, T] int64, the key at a slot; an arbitrary valid key at the slots of queries.
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
    """The timeline of keys with lifespans [B, H, K] and the last `queries` of the K positions.  O(K log K) time."""
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
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    lifespans: Lifespans,
    *,
    in_order: bool | None,
    ranked: bool,
    exact: bool,
    score_mod: ScoreMod | None,
    reads_device: bool,
) -> Tensor:
    """Attention [B, Hq, Q, Dv] for any lifespans, by an `attend` whose keys are born at their own positions.

    attend: called as attend(query, key, value, bias, reference, lifespans, score_mod), with bias [B, Hkv, K] and reference
        [B, Hkv, Q].
    in_order: whether keys are born at their own positions; None = not known.  ranked, exact: see `visible_reference`.
    reads_device: read births, to use the timeline only where needed and without the slots before the first query.
    """
    queries = query.shape[2]
    bias, reference = biases(key, bias, lifespans, queries, ranked=ranked, exact=exact)
    if in_order is None:
        in_order = reads_device and births_are_positions(lifespans)
    if in_order:
        # Keys that no query sees take no slot, and their contents reach no query.
        unseen = lifespans.death <= lifespans.birth.clamp(min=key.shape[2] - queries)
        lifespans = lifespans._replace(death=lifespans.death.masked_fill(unseen, 0))
        return attend(query, key, value, bias, reference, lifespans, score_mod)
    batch, heads, keys, _size = key.shape
    group = query.shape[1] // heads
    line = Timeline(*(tensor.expand(batch, heads, -1) for tensor in timeline(lifespans, queries)))
    start = int(line.slot[..., 0].min()) if reads_device and line.slot.numel() else 0
    rows = line.query[..., start:]
    slots = torch.arange(keys + queries, dtype=torch.int32, device=key.device)
    output = attend(
        _per_group(query, rows, group),
        along_keys(key, line.key),
        along_keys(value, line.key),
        along_keys(bias, line.key),
        along_keys(reference, rows),
        Lifespans(slots.expand_as(line.death), line.death),
        None if score_mod is None else _score_mod_at_slots(score_mod, line, keys - queries, group),
    )
    return _per_group(output, line.slot - start, group)


def _score_mod_at_slots(score_mod: ScoreMod, line: Timeline, first_query: int, group: int) -> ScoreMod:
    """A score_mod that maps slots of the timeline to positions and calls `score_mod`."""
    query_position, key_position = line.query + first_query, line.key

    def at_slot(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score_mod(score, b, h, query_position[b, h // group, i], key_position[b, h // group, j])

    return at_slot


def _per_group(tensor: Tensor, order: Tensor, group: int) -> Tensor:
    """[B, Hq, n, D] at order [B, Hkv, m] -> [B, Hq, m, D]."""
    rows = tensor.unflatten(1, (order.shape[1], group)).transpose(2, 3)  # [B, Hkv, n, G, D]
    return along_keys(rows, order).transpose(2, 3).flatten(1, 2)
