"""Pairs that a mask shows, and blocks that are visited: exact, in closed form.

A block is `rows` rows by `columns` keys; with G = Hq / Hkv query heads folded into rows it spans T = rows / G positions.
"""

import sympy
from sympy import Expr, Min, Piecewise, ceiling, floor, log

from flexdma.cost.symbols import Hkv, Hq, N, columns, rows, w
from flexdma.packing import CLASS_BASE, FIRST_CLASS

GROUP = Hq / Hkv
SPAN = rows * Hkv / Hq  # positions of a block's rows


def shown_pairs() -> Expr:
    """Pairs of query and key that a causal top-w shows, per head: query i sees min(i + 1, w) keys."""
    width = Min(w, N)
    return N * width - width * (width - 1) / 2


def visited_blocks() -> Expr:
    """Blocks that a sliding window of w visits, per KV head: what DMA is while its gates are equal (A = 0).

    Exact for all N and w where T divides `columns` or `columns` divides T: row block r spans positions rT to its last p,
    and visits the key blocks from floor(max(0, rT - w + 1) / columns) to floor(p / columns).
    """
    count = row_blocks()
    last = _sum_of_floors(SPAN - 1, count - 1) + floor((N - 1) / columns)
    skipped = ceiling((w - 1) / SPAN)  # row blocks before this one see the first key
    within = Piecewise((count - skipped, skipped < count), (0, True))
    first = _sum_of_floors(SPAN * skipped - (w - 1), within)
    return count + last - first


def causal_blocks() -> Expr:
    """Blocks that a causal mask visits, per KV head; as exact as `visited_blocks`."""
    return visited_blocks().subs(w, N)


def row_blocks() -> Expr:
    """Row blocks of a KV head."""
    return ceiling(N * GROUP / rows)


def key_blocks() -> Expr:
    """Key blocks of a KV head."""
    return ceiling(N / columns)


def entries_per_row_block() -> Expr:
    """Length of a row block's index list: one more than `flexdma.packing.most_visited`, where that is smaller than all.

    Exact where a block of rows reaches into at most FIRST_CLASS w positions.
    """
    positions = floor((rows + GROUP - 2) / GROUP) + 1
    longest = FIRST_CLASS * w
    classes = Piecewise((ceiling(log(N / longest, CLASS_BASE)), longest < N), (0, True))
    most = floor((5 * w + positions) / columns) + 2 + classes * (floor((CLASS_BASE + 2) * w / columns) + 2)
    return Min(Min(most, w + positions) + 1, key_blocks())


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
