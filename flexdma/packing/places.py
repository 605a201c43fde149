"""Packing: a layout of the keys in which the visible ones lie together, so that whole blocks can be skipped.

Attention does not care about the order of its keys, only a block mask does.  In natural order a key that outlives its
neighbours keeps their whole block alive.  Packed, the queries are cut in periods of about 2 w positions; each period has
places of its own for the keys that any of its queries sees, at most w old ones and one for each of its positions, and
they stand in order of death.  A key that lives on has a place in each period it reaches: one piece of its lifespan each.

So a block of queries visits blocks of its own period alone, at most (w + period) / columns of them whatever the gates, and
a block of keys is visited by queries of its own period alone: lists of blocks are short, and making them takes O(K).
The price is room: 1.5 places for a key, at most 2.  Bounds and figures: docs/packing.md.
"""

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexdma.lifespans import Lifespans
from flexdma.lifespans.order_statistics import scattered
from flexdma.rounding import ceil_div, round_up

# Positions of a period: in units of w, measured best of 2, 3, 4 and 8 over seven gate families; and in key blocks, so that
# rounding its places up to whole ones costs little.
PERIOD, PERIOD_BLOCKS = 2, 2


class Layout(NamedTuple):
    """Where keys may be placed, in `periods` periods of `period` query positions.

    unit None: each period has `places`.  Otherwise all periods share `places`: each takes what it needs, in multiples of
        `unit`.
    """

    period: int
    periods: int
    places: int
    unit: int | None = None

    @property
    def total(self) -> int:
        """Places of all periods."""
        return self.places if self.unit is not None else self.periods * self.places


class Packing(NamedTuple):
    """Keys at their places, L = layout.total of them; int32.

    order: [B, H, L], the key at a place.  Unused places hold an arbitrary valid key.
    birth, death: [B, H, L], the queries (0 = the first) that see the piece at this place: birth <= query < death, inside
        the place's period.  Unused places have birth = death = 0, which hides them.
    pieces: [B, H, L], the places of the keys' pieces, those of key 0, then of key 1, ...; then zeros.
    starts: [B, H, K + 1], where in `pieces` those of each key begin, and where the last ones end.
    layout: the same for all heads.
    """

    order: Tensor
    birth: Tensor
    death: Tensor
    pieces: Tensor
    starts: Tensor
    layout: Layout


torch.serialization.add_safe_globals([Layout, Packing])  # `torch.load` takes them


def packed_layout(
    queries: int,
    keys: int,
    capacity: int,
    *,
    block_size: tuple[int, int] = (1, 1),
    group: int = 1,
    any_births: bool = False,
) -> Layout:
    """The periods of the last `queries` of `keys` positions, of which no query sees more than `capacity`.

    block_size: (rows, columns) that periods and their places are made of; a position has `group` rows.  One period is as
    long as its queries.
    any_births: several keys may be born at one position.  Nothing then bounds what one period needs, so periods share their
        places: a key has one piece, and one more for each later period it reaches.
    """
    rows, columns = block_size
    step = rows // gcd(rows, group)
    period = round_up(max(PERIOD * capacity, PERIOD_BLOCKS * columns), step)
    if queries <= period or keys <= capacity + period:
        places = keys if any_births else min(keys, capacity + queries)
        return Layout(round_up(queries, step), 1, round_up(places, columns))
    periods = ceil_div(queries, period)
    if any_births:
        places = keys + capacity * (periods - 1) + periods * (columns - 1)
        return Layout(period, periods, round_up(places, columns), columns)
    return Layout(period, periods, round_up(capacity + period, columns))


def pack(lifespans: Lifespans, layout: Layout, *, queries: int) -> Packing:
    """Keys at the places of a layout.

    lifespans: birth, death [B, H, K]; the queries are the last `queries` of the K positions.
    layout: `packed_layout` of these sizes, and of a capacity that no query exceeds.

        birth = [0 1 2 3 4 5], death = [2 6 3 6 6 6], layout = (period 3, 2 periods, 5 places)
        order = [0 1 2 - - | 1 3 4 5 -]         key 1 lives on: queries 1 and 2 see it left, 3 to 5 right

    One sort and two binary searches; O(K log K) time, O(K) memory.
    """
    period, periods, places, unit = layout
    keys = lifespans.birth.shape[-1]
    first_query = keys - queries
    # In queries, 0 = the first.  Not clamp: Inductor fails to simplify the quotient of a clamped arange, which births are.
    born = torch.where(lifespans.birth < first_query, 0, lifespans.birth - first_query)
    dies = (lifespans.death - first_query).clamp(max=queries)
    first_period = born // period
    count = torch.where(dies > born, (dies - 1) // period - first_period + 1, 0)  # pieces of each key
    ends = count.cumsum(-1, dtype=torch.int32)

    number = torch.arange(layout.total, dtype=torch.int32, device=born.device)
    owner, sorted_end, by_end = _sorted_pieces(first_period, dies, count, ends, number, layout)
    bounds = period * torch.arange(periods + 1, dtype=torch.int32, device=born.device)
    period_begin = torch.searchsorted(sorted_end, bounds.expand(*born.shape[:-1], -1).contiguous(), right=True)

    # The n-th place of a period takes the n-th of its pieces.
    if unit is None:
        place_begin = places * torch.arange(periods, dtype=torch.int32, device=born.device).expand(*born.shape[:-1], -1)
        place_period = (number // places).expand_as(owner).long()
        rank = number % places
    else:
        room = (period_begin[..., 1:] - period_begin[..., :-1] + unit - 1) // unit * unit
        place_begin = (room.cumsum(-1) - room).int()
        place_period = torch.searchsorted(place_begin, number.expand_as(owner).contiguous(), right=True) - 1
        rank = number - place_begin.gather(-1, place_period)
    piece = period_begin.gather(-1, place_period) + rank
    period_end = period_begin.gather(-1, place_period + 1)
    used = piece < period_end
    # Unused places hold an arbitrary valid key; birth = death = 0 hides them.
    piece = torch.minimum(piece, period_end - 1).clamp(min=0)
    order = owner.gather(-1, by_end.gather(-1, piece))
    birth = torch.where(used, torch.maximum(born.gather(-1, order), place_period.int() * period), 0)
    death = torch.where(used, sorted_end.gather(-1, piece), 0)

    # And the other way round: the place of each piece, in order of keys.
    end_period = (sorted_end - 1).clamp(max=periods * period - 1) // period
    place = place_begin.gather(-1, end_period.long()) + number - period_begin.gather(-1, end_period.long())
    pieces = scattered(torch.where(sorted_end <= periods * period, place, 0).int(), by_end)
    return Packing(order.int(), birth.int(), death.int(), pieces, pad(ends, (1, 0)), layout)


def _sorted_pieces(
    first_period: Tensor, dies: Tensor, count: Tensor, ends: Tensor, number: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """The key of each piece, in order of keys; the ends of all pieces, sorted; and the pieces in that order.  All [B, H, L].

    first_period, dies, count, ends: [B, H, K], the period of a key's birth, the query of its death, how many pieces it has,
        and how many it and the keys before it have.
    number: [L], from 0 on.  Pieces beyond the last have an end above every other.
    """
    period, periods, *_ = layout
    owner = torch.searchsorted(ends, number.expand(*ends.shape[:-1], -1).contiguous(), right=True)
    owner = owner.clamp(max=ends.shape[-1] - 1)
    reached = first_period.gather(-1, owner) + number - (ends - count).gather(-1, owner)
    end = torch.minimum(dies.gather(-1, owner), (reached + 1) * period)
    # Sorting pieces by end groups them by period: that is the final layout.
    sorted_end, by_end = torch.where(number < ends[..., -1:], end, periods * period + 1).sort(dim=-1, stable=True)
    return owner, sorted_end, by_end


def along_keys(tensor: Tensor, order: Tensor) -> Tensor:
    """Keys [B, H, K, ...] at the places of order [B, H, n] int64: [B, H, n, ...]."""
    trailing = tensor.shape[3:]
    return tensor.gather(2, order.view(*order.shape, *[1] * len(trailing)).expand(*order.shape, *trailing))
