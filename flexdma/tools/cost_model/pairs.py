"""Pairs of a query and a key, per query head.  Lengths and capacities are numbers or sympy expressions."""

from typing import Any

from sympy import Min

from flexdma.lowerings.plain import BLOCK_SIZE
from flexdma.tools.cost_model.symbols import N, w


def shown_pairs(length: Any = N, capacity: Any = w) -> Any:
    """Pairs that a causal selection shows: query i sees min(i + 1, capacity) keys.  capacity = length is a causal mask."""
    width = Min(capacity, length)
    return length * width - width * (width - 1) / 2


def gathered_pairs(length: Any = N, capacity: Any = w) -> Any:
    """Pairs that the gather lowering computes: each query with `capacity` slots and the own keys of its block."""
    return length * (Min(capacity, length) + BLOCK_SIZE)
