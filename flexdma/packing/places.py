"""Packing: a layout that puts visible keys next to each other, so that kernels can skip whole blocks.

The result of attention does not depend on the order of the keys, but the number of visited blocks does.  In natural order
one long-lived key makes queries visit its whole block.  Packing cuts the queries into periods of about 2 w positions.  Each
period has its own places for the keys that any of its queries sees: at most w older keys and one key per position, sorted
by death.  A key has one place in each period that it reaches, for one piece of its lifespan.

A block of queries then visits blocks of its own period only, at most (w + period) / columns of them for any gates, and only
queries of its own period visit a block of keys.  So lists of blocks are short, and making them takes O(K).
The cost is memory: 1.5 places per key, at most 2.  Bounds and figures: docs/packing.md.
"""

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexdma.lifespans import Lifespans
from flexdma.lifespans.order_statistics import scattered
from flexdma.packing.counting import count_up_to, sorted_rows
from flexdma.rounding import ceil_div, round_up

# The least number of positions of a period, in units of w (the best of 2, 3, 4 and 8 over seven gate families, measured),
# and in key blocks (so that rounding places up to whole blocks costs little).
PERIOD, PERIOD_BLOCKS = 2, 2
# Of keys that no ranking selects: a ranking evicts most keys early, other policies keep them about w queries.
UNRANKED_PERIOD = 1


class Layout(NamedTuple):
    """The places for keys, in `periods` periods of `period` query positions.

    places: of each period where unit is None.  Otherwise all periods share them, and each takes a multiple of `unit`.
    by_death: whether the keys of a period are in order of death.  False = in their own order, in one period.
    """

    period: int
    periods: int
    places: int
    unit: int | None = None
    by_death: bool = True

    @property
    def total(self) -> int:
        """L: places of all periods."""
        return self.places if self.unit is not None else self.periods * self.places


class Packing(NamedTuple):
    """Keys at L = layout.total places; all tensors int32.

    order: [B, H, L], the key at each place.  Unused places hold an arbitrary valid key.
    birth, death: [B, H, L], the queries (0 = the first) that see the piece at a place: birth <= query < death, inside the
        period of the place.  Unused places have birth = death = 0, which hides them.
    pieces: [B, H, L], the places of all pieces: first those of key 0, then of key 1, ...; then zeros.
    starts: [B, H, K + 1]: the places of key j are pieces[starts[j]:starts[j + 1]].
    layout: the same for all heads.

    Of keys with P intervals this is the packing of their terms (`flexdma.lifespans.terms`), in place of keys.
    """

    order: Tensor
    birth: Tensor
    death: Tensor
    pieces: Tensor
    starts: Tensor
    layout: Layout

    def of_keys(self, terms_per_key: int) -> "Packing":
        """The same places with the key of each term as `order`, and the pieces of all terms of a key as its pieces."""
        if terms_per_key == 1:
            return self
        order = self.order.div(terms_per_key, rounding_mode="floor")
        return self._replace(order=order, starts=self.starts[..., ::terms_per_key])


torch.serialization.add_safe_globals([Layout, Packing])  # torch.load(weights_only=True) loads no other classes


def packed_layout(
    queries: int,
    keys: int,
    capacity: int,
    *,
    block_size: tuple[int, int] = (1, 1),
    group: int = 1,
    any_births: bool = False,
    ranked: bool = True,
) -> Layout:
    """The layout for the last `queries` of `keys` positions, where no query sees more than `capacity` keys.

    block_size: (rows, columns).  Periods are whole row blocks, with `group` rows per position, and their places whole key
        blocks.  Where one period is enough, it is as long as the queries.
    any_births: several keys may be born at one position.  Then nothing bounds the places of one period, so all periods share
        their places: one for each key, and one more for each later period that it reaches.
    ranked: a ranking of gates selects the keys.  False = periods are half as long, for twice as many places as keys.
    """
    rows, columns = block_size
    step = rows // gcd(rows, group)
    windows = PERIOD if ranked else UNRANKED_PERIOD
    period = round_up(max(windows * capacity, PERIOD_BLOCKS * columns), step)
    if queries <= period or (ranked and keys <= capacity + period):
        places = keys if any_births else min(keys, capacity + queries)
        return Layout(round_up(queries, step), 1, round_up(places, columns))
    periods = ceil_div(queries, period)
    if any_births:
        places = keys + capacity * (periods - 1) + periods * (columns - 1)
        return Layout(period, periods, round_up(places, columns), columns)
    return Layout(period, periods, round_up(capacity + period, columns))


def layout_in_order(queries: int, keys: int, *, block_size: tuple[int, int], group: int = 1) -> Layout:
    """The layout that leaves keys in their own order; arguments as in `packed_layout`."""
    rows, columns = block_size
    return Layout(round_up(queries, rows // gcd(rows, group)), 1, round_up(keys, columns), by_death=False)


def pack(lifespans: Lifespans, layout: Layout, *, queries: int) -> Packing:
    """Put keys at the places of a layout.

    lifespans: birth, death [B, H, K]; the queries are the last `queries` of the K positions.
    layout: `packed_layout` of these sizes and of a capacity that no query exceeds.

        birth = [0 1 2 3 4 5], death = [2 6 3 6 6 6], layout = (period 3, 2 periods, 5 places)
        order = [0 1 2 - - | 1 3 4 5 -]         key 1 has two pieces: queries 1 and 2 see the left one, 3 to 5 the right one

    One sort and two binary searches; O(K log K) time, O(K) memory.
    """
    period, periods, places, unit, by_death = layout
    keys = lifespans.birth.shape[-1]
    first_query = keys - queries
    # As query indices, 0 = the first.  Births may be an arange, and Inductor fails to simplify the quotient of a clamped
    # arange: hence `where` instead of clamp.
    born = torch.where(lifespans.birth < first_query, 0, lifespans.birth - first_query)  # [B, H, K]
    dies = (lifespans.death - first_query).clamp(max=queries)
    first_period = born // period
    count = torch.where(dies > born, (dies - 1) // period - first_period + 1, 0)  # pieces of each key
    ends = count.cumsum(-1, dtype=torch.int32)

    number = torch.arange(layout.total, dtype=torch.int32, device=born.device)
    owner, sorted_end, by_end = _sorted_pieces(first_period, dies, count, ends, number, layout)
    bounds = period * torch.arange(periods + 1, dtype=torch.int32, device=born.device)
    period_begin = count_up_to(sorted_end, bounds) if by_death else pad(ends[..., -1:], (1, 0))

    # The n-th place of a period takes its n-th piece.  place_begin [B, H, periods], period_begin [B, H, periods + 1], others
    # [B, H, L].
    if unit is None:
        place_begin = places * torch.arange(periods, dtype=torch.int32, device=born.device).expand(*born.shape[:-1], -1)
        place_period = (number // places).expand_as(owner).long()
        rank = number % places
    else:
        room = (period_begin[..., 1:] - period_begin[..., :-1] + unit - 1) // unit * unit
        place_begin = (room.cumsum(-1) - room).int()
        place_period = count_up_to(place_begin, number) - 1
        rank = number - place_begin.gather(-1, place_period)
    piece = period_begin.gather(-1, place_period) + rank
    period_end = period_begin.gather(-1, place_period + 1)
    used = piece < period_end
    # Unused places hold an arbitrary valid key; birth = death = 0 hides them.
    piece = torch.minimum(piece, period_end - 1).clamp(min=0)
    order = owner.gather(-1, by_end.gather(-1, piece))
    birth = torch.where(used, torch.maximum(born.gather(-1, order), place_period.int() * period), 0)
    death = torch.where(used, sorted_end.gather(-1, piece), 0)

    # The inverse: the place of each piece, in order of keys.
    end_period = (sorted_end - 1).clamp(max=periods * period - 1) // period
    place = place_begin.gather(-1, end_period.long()) + number - period_begin.gather(-1, end_period.long())
    pieces = scattered(torch.where(sorted_end <= periods * period, place, 0).int(), by_end)
    return Packing(order.int(), birth.int(), death.int(), pieces, pad(ends, (1, 0)), layout)


def _sorted_pieces(
    first_period: Tensor, dies: Tensor, count: Tensor, ends: Tensor, number: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """The key of each piece, pieces in order of keys; the ends of all pieces in the layout's order; the pieces in that order.

    first_period, dies, count, ends: [B, H, K], the period of a key's birth, the query of its death, its number of pieces, and
        the cumulated number of pieces up to this key.
    number: arange [L].
    Returns three [B, H, L].  Numbers beyond the last piece get an end above every other.
    """
    period, periods, *_ = layout
    owner = count_up_to(ends, number).clamp(max=ends.shape[-1] - 1)
    reached = first_period.gather(-1, owner) + number - (ends - count).gather(-1, owner)
    end = torch.minimum(dies.gather(-1, owner), (reached + 1) * period)
    end = torch.where(number < ends[..., -1:], end, periods * period + 1)
    if not layout.by_death:
        return owner, end, number.long().expand_as(end)
    # Sorting pieces by end groups them by period: that is the final layout.
    return owner, *sorted_rows(end, periods * period + 2)


def along_keys(tensor: Tensor, order: Tensor) -> Tensor:
    """Gather keys: [B, H, K, ...] at order [B, H, n] int64 -> [B, H, n, ...]."""
    trailing = tensor.shape[3:]
    return tensor.gather(2, order.view(*order.shape, *[1] * len(trailing)).expand(*order.shape, *trailing))
