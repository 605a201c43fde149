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
    """Where keys may be placed: `places` for each of `periods` periods of `period` query positions."""

    period: int
    periods: int
    places: int


class Packing(NamedTuple):
    """Keys at their places, L = layout.periods * layout.places of them; int32.

    order: [B, H, L], the key at a place.  A place without one repeats a key of its block, or of a block without any.
    birth, death: [B, H, L], the queries (0 = the first) that see the piece at this place: birth <= query < death, inside
        the place's period.  A place without a key has birth = death = 0.
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
    queries: int, keys: int, capacity: int, *, block_size: tuple[int, int] = (1, 1), group: int = 1
) -> Layout:
    """The periods of the last `queries` of `keys` positions, of which no query sees more than `capacity`.

    block_size: (rows, columns) that periods and their places are made of; a position has `group` rows.  One period is as
    long as its queries.
    """
    rows, columns = block_size
    step = rows // gcd(rows, group)
    period = round_up(max(PERIOD * capacity, PERIOD_BLOCKS * columns), step)
    if queries <= period or keys <= capacity + period:
        places = min(keys, capacity + queries)
        return Layout(round_up(queries, step), 1, round_up(places, columns))
    return Layout(period, ceil_div(queries, period), round_up(capacity + period, columns))


def pack(lifespans: Lifespans, layout: Layout, *, queries: int) -> Packing:
    """Keys at the places of a layout.

    lifespans: birth, death [B, H, K]; the queries are the last `queries` of the K positions.
    layout: `packed_layout` of these sizes, and of a capacity that no query exceeds.

        birth = [0 1 2 3 4 5], death = [2 6 3 6 6 6], layout = (period 3, 2 periods, 5 places)
        order = [0 1 2 - - | 1 3 4 5 -]         key 1 lives on: queries 1 and 2 see it left, 3 to 5 right

    One sort and two binary searches; O(K log K) time, O(K) memory.
    """
    period, periods, places = layout
    length = lifespans.birth.shape[-1]
    first_query = length - queries
    # Not clamp: Inductor fails to simplify the quotient of a clamped arange, which births are.
    birth = torch.where(lifespans.birth < first_query, 0, lifespans.birth - first_query)
    death = (lifespans.death - first_query).clamp(max=queries)
    first = birth // period
    count = torch.where(death > birth, (death - 1) // period - first + 1, 0)
    ends = count.cumsum(-1, dtype=torch.int32)

    # Pieces in order of keys.  The end of a piece says its period, too: sorted by it, pieces stand as they are to lie.
    number = torch.arange(periods * places, dtype=torch.int32, device=birth.device)
    every = number.expand(*birth.shape[:-1], -1).contiguous()
    owner = torch.searchsorted(ends, every, right=True).clamp(max=length - 1)
    reached = first.gather(-1, owner) + number - (ends - count).gather(-1, owner)
    end = torch.minimum(death.gather(-1, owner), (reached + 1) * period)
    none = periods * period + 1
    end, piece = torch.where(number < ends[..., -1:], end, none).sort(dim=-1, stable=True)

    bounds = period * torch.arange(periods + 1, dtype=torch.int32, device=birth.device)
    begins = torch.searchsorted(end, bounds.expand(*birth.shape[:-1], -1).contiguous(), right=True)
    mine = (number // places).expand_as(owner).long()
    source = begins.gather(-1, mine) + number % places
    taken = source < begins.gather(-1, mine + 1)
    source = torch.minimum(source, begins.gather(-1, mine + 1) - 1).clamp(min=0)
    order = owner.gather(-1, piece.gather(-1, source))
    birth = torch.where(taken, torch.maximum(birth.gather(-1, order), number // places * period), 0)
    death = torch.where(taken, end.gather(-1, source), 0)

    at = (end - 1).clamp(max=none - 2) // period
    place = at * places + number - begins.gather(-1, at.long())
    pieces = scattered(torch.where(end < none, place, 0).int(), piece)
    return Packing(order.int(), birth.int(), death.int(), pieces, pad(ends, (1, 0)), layout)


def along_keys(tensor: Tensor, order: Tensor) -> Tensor:
    """Keys [B, H, K, ...] at the places of order [B, H, n] int64: [B, H, n, ...]."""
    trailing = tensor.shape[3:]
    return tensor.gather(2, order.view(*order.shape, *[1] * len(trailing)).expand(*order.shape, *trailing))
