"""Numbers of places of packed keys and of visited blocks, exact and in closed form.

A block is `rows` rows by `columns` keys; with G = Hq / Hkv query heads folded into rows it spans T = rows / G positions.
Rows by head (`flexdma.packing.rows`) have T = rows and the lists of G = 1 for each query head, which are as many blocks.
Keys are packed as `flexdma.packing.packed_layout` packs a whole sequence, Q = K = N, of which a query sees at most w.
"""

from math import gcd

import sympy
from sympy import Expr, Max, Piecewise, ceiling, floor

from flexdma.packing import PERIOD, PERIOD_BLOCKS
from flexdma.tools.cost_model.symbols import Hkv, Hq, N, columns, rows, w

GROUP = Hq / Hkv
SPAN = rows * Hkv / Hq  # positions of a block's rows


class CommonDivisor(sympy.Function):
    """The greatest common divisor of two positive integers; unevaluated until both are numbers."""

    is_integer = is_positive = True

    @classmethod
    def eval(cls, first: Expr, second: Expr) -> Expr | None:
        """The divisor; None while one of them is symbolic."""
        return sympy.Integer(gcd(int(first), int(second))) if first.is_number and second.is_number else None


STEP = rows / CommonDivisor(rows, GROUP)  # the fewest positions that fill whole row blocks
PERIOD_LENGTH = STEP * ceiling(Max(PERIOD * w, PERIOD_BLOCKS * columns) / STEP)  # positions, with several periods
ONE_PERIOD = sympy.Le(N, w + PERIOD_LENGTH)


def visited_blocks() -> Expr:
    """Blocks that a sliding window of w visits, per KV head.  DMA with equal gates (A = 0) is a sliding window.

    Exact for all N and w where T divides `columns` or `columns` divides T.
    """
    more = periods() - 1
    several = _visited_first(PERIOD_LENGTH) + (more - 1) * _visited_later(PERIOD_LENGTH)
    return Piecewise((_visited_first(N), ONE_PERIOD), (several + _visited_later(N - more * PERIOD_LENGTH), True))


def causal_blocks() -> Expr:
    """Blocks that a causal mask visits, per KV head, with keys in natural order; exact as `visited_blocks` is."""
    return _visited_first(N).subs(w, N)


def periods() -> Expr:
    """Number of periods."""
    return Piecewise((1, ONE_PERIOD), (ceiling(N / PERIOD_LENGTH), True))


def key_blocks() -> Expr:
    """Key blocks of a period."""
    return ceiling(Piecewise((N, ONE_PERIOD), (w + PERIOD_LENGTH, True)) / columns)


def places() -> Expr:
    """Places for the keys of a KV head, L."""
    return periods() * key_blocks() * columns


def row_blocks() -> Expr:
    """Row blocks of a KV head."""
    return ceiling(N * GROUP / rows)


def row_blocks_of_a_period() -> Expr:
    """Row blocks that may see a key block."""
    return Piecewise((row_blocks(), ONE_PERIOD), (PERIOD_LENGTH / SPAN, True))


def _visited_first(positions: Expr) -> Expr:
    """Blocks visited in the first period, of this many positions.

    Row block r spans positions rT to its last, p, and visits the key blocks from floor(max(0, rT - w + 1) / columns) to
    floor(p / columns).
    """
    count = ceiling(positions / SPAN)
    last = _sum_of_floors(SPAN - 1, count - 1) + floor((positions - 1) / columns)
    skipped = ceiling((w - 1) / SPAN)  # row blocks before this one see the first key
    within = Piecewise((count - skipped, skipped < count), (0, True))
    first = _sum_of_floors(SPAN * skipped - (w - 1), within)
    return count + last - first


def _visited_later(positions: Expr) -> Expr:
    """Blocks visited in a later period: w - 1 older keys come before its own, so position p sees places p to p + w - 1."""
    count = ceiling(positions / SPAN)
    last = _sum_of_floors(SPAN + w - 2, count - 1) + floor((positions + w - 2) / columns)
    return count + last - _sum_of_floors(sympy.Integer(0), count)


def _sum_of_floors(offset: Expr, count: Expr) -> Expr:
    """Sum over r = 0 .. count - 1 of floor((r T + offset) / columns), offset >= 0."""
    tall, wide = SPAN / columns, columns / SPAN  # one of them is an integer
    many_keys = tall * count * (count - 1) / 2 + count * floor(offset / columns)
    start = floor(offset / SPAN)
    many_rows = _floors_below(start + count, wide) - _floors_below(start, wide)
    return Piecewise((many_rows, sympy.Le(SPAN, columns)), (many_keys, True))


def _floors_below(end: Expr, divisor: Expr) -> Expr:
    """Sum over s = 0 .. end - 1 of floor(s / divisor)."""
    whole = floor(end / divisor)
    return divisor * whole * (whole - 1) / 2 + whole * (end - divisor * whole)
