"""A cost model: nanoseconds of attention to everything and of each lowering, and where they break even.

For one KV head with G query heads, N positions, capacity C = w + sinks + recent:

    causal  = G N (N + 1) / 2 * rates.causal                                   SDPA, is_causal=True
    gather  = G N (min(C, N) + 128) * rates.gather + N log2 N * rates.gather_selection
    flex    = G N v * rates.flex                   + N log2 N * rates.flex_selection

128 stands for a block's own keys, all of which training gathers; inference gathers those that are born, for more queries.
v is the pairs that the visited blocks hold, per query.  Rates are measured, not derived: a tile of flexdma costs more
than a tile of SDPA because it loads gates and applies a mask, and on a CPU because Inductor's matrix products are slower.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log2

from flexdma.lowerings.gather import BLOCK_SIZE as GATHER_BLOCK

LONGEST = 2**24  # a break-even length beyond this is reported as none


@dataclass(frozen=True)
class Rates:
    """Nanoseconds per pair of query and key of one query head, and per N log2 N keys of one KV head."""

    measured_on: str
    causal: float
    gather: float | None  # None: not offered there
    gather_selection: float
    flex: float | None
    flex_selection: float

    def of(self, lowering: str) -> float | None:
        """The rate of a lowering by name."""
        return {"gather": self.gather, "flex": self.flex}[lowering]


EPYC = "AMD EPYC, 2 threads, torch 2.13.0+cpu, float32, D=64"
# (device, phase), fitted to docs/benchmarks.md, whose contenders took turns; they reproduce its rows within 15 %.
# They are the geometric means over the two shapes of each phase.
# CUDA has not been measured: explanation/calibration.py does it where there is a GPU.
RATES = {
    ("cpu", "inference"): Rates(EPYC, causal=1.88, gather=2.44, gather_selection=24.8, flex=4.33, flex_selection=28.2),
    ("cpu", "training"): Rates(EPYC, causal=7.49, gather=12.5, gather_selection=24.8, flex=None, flex_selection=28.2),
}


@dataclass(frozen=True)
class Problem:
    """What the model is asked about: sizes of one KV head, and how densely packing fills the blocks."""

    length: int
    window: int
    always: int  # sinks + recent
    group: int  # query heads per KV head
    visited_pairs_per_query: float  # v, at this length and window

    @property
    def capacity(self) -> int:
        """The most keys that a query sees."""
        return self.window + self.always


def causal_cost(rates: Rates, problem: Problem) -> float:
    """Nanoseconds of causal attention to everything."""
    return problem.group * problem.length * (problem.length + 1) / 2 * rates.causal


def gather_cost(rates: Rates, problem: Problem) -> float:
    """Nanoseconds of the gather lowering; it does not depend on the gates."""
    if rates.gather is None:
        raise ValueError("rates: expected a rate of the gather lowering, got None")
    slots = min(problem.capacity, problem.length) + GATHER_BLOCK
    return problem.group * problem.length * slots * rates.gather + sorted_keys(problem) * rates.gather_selection


def flex_cost(rates: Rates, problem: Problem) -> float:
    """Nanoseconds of the flex lowering over the blocks it visits."""
    if rates.flex is None:
        raise ValueError("rates: expected a rate of the flex lowering, got None")
    pairs = problem.group * problem.length * problem.visited_pairs_per_query
    return pairs * rates.flex + sorted_keys(problem) * rates.flex_selection


COSTS: dict[str, Callable[[Rates, Problem], float]] = {"gather": gather_cost, "flex": flex_cost}


def speedup(rates: Rates, lowering: str, problem: Problem) -> float:
    """How many times faster than causal attention to everything."""
    return causal_cost(rates, problem) / COSTS[lowering](rates, problem)


def resized(problem: Problem, length: int, window: int) -> Problem:
    """The same gates at another length and window: visited blocks grow as the keys that a query sees on average."""
    growth = _seen(length, window + problem.always) / _seen(problem.length, problem.capacity)
    return Problem(length, window, problem.always, problem.group, problem.visited_pairs_per_query * growth)


def break_even_length(rates: Rates, lowering: str, problem: Problem) -> int | None:
    """The shortest length from which this window pays; None where no length up to 2**24 does."""

    def pays(length: int) -> bool:
        return speedup(rates, lowering, resized(problem, length, problem.window)) >= 1

    if not pays(LONGEST):
        return None
    # The speed-up rises with length, so bisection finds the one crossing.
    low, high = 1, LONGEST
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle + 1, high)
    return low


def break_even_window(rates: Rates, lowering: str, problem: Problem) -> int | None:
    """The widest window that pays at this length, at most the length; None where not even 1 does."""

    def pays(window: int) -> bool:
        return speedup(rates, lowering, resized(problem, problem.length, window)) >= 1

    if not pays(1):
        return None
    low, high = 1, problem.length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if pays(middle) else (low, middle - 1)
    return low


def sorted_keys(problem: Problem) -> float:
    """N log2 N, what selecting takes."""
    return problem.length * log2(max(2, problem.length))


def _seen(length: int, capacity: int) -> float:
    """Keys that a query sees, on average: the first ones see fewer than the capacity."""
    capacity = min(capacity, length)
    return capacity - capacity * (capacity - 1) / (2 * length)
