"""Nanoseconds of causal attention to all keys and of each lowering, at measured rates.

For one KV head with G query heads, N positions, capacity C = w + sinks + recent:

    causal  = G shown_pairs(N, N)       * rates.causal                                   SDPA, is_causal=True
    gather  = G gathered_pairs(N, C)    * rates.gather + N log2 N * rates.gather_selection
    flex    = G rho shown_pairs(N, C)   * rates.flex   + N log2 N * rates.flex_selection

gathered_pairs counts all keys of blocks of 128 positions.  The fused kernel gathers only keys that are ever visible, for
larger blocks, and its rates are fitted to the same formula.  Rates are measured, not derived.  A tile of flexdma takes longer
than a tile of SDPA, because it loads gates and applies a mask, and on a CPU because Inductor's matrix products are slower.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log2

from flexdma.tools.cost_model.pairs import gathered_pairs, shown_pairs


@dataclass(frozen=True)
class Rates:
    """Nanoseconds per pair of query and key of one query head, and per N log2 N keys of one KV head."""

    measured_on: str
    causal: float
    gather: float | None  # None = not available there
    gather_selection: float
    flex: float | None
    flex_selection: float

    def of(self, lowering: str) -> float | None:
        """The rate of a lowering by name."""
        return {"gather": self.gather, "flex": self.flex}[lowering]


XEON = "Intel(R) Xeon(R) Processor, 2 threads, torch 2.13.0+cpu, float32, D=64"
# (device, phase): geometric means over the two shapes of each phase of docs/benchmarks.md, whose contenders took turns.
# They reproduce its rows within 15 %.  `python -m flexdma explain --fit docs/results/bench-cpu.json` prints them.
# CUDA has not been measured; `python -m flexdma explain --calibrate` measures it on a machine with a GPU.
RATES = {
    ("cpu", "inference"): Rates(XEON, causal=0.953, gather=1.42, gather_selection=24.8, flex=4.82, flex_selection=31.0),
    ("cpu", "training"): Rates(XEON, causal=3.46, gather=5.60, gather_selection=24.8, flex=None, flex_selection=31.0),
}


@dataclass(frozen=True)
class Problem:
    """The inputs of the model: sizes of one KV head, and the density of the visited blocks."""

    length: int
    window: int
    always: int  # sinks + recent
    group: int  # query heads per KV head
    rho: float  # pairs in the visited blocks over shown_pairs(length, capacity)

    @property
    def capacity(self) -> int:
        """Upper bound on the keys that one query sees."""
        return self.window + self.always


def causal_cost(rates: Rates, problem: Problem) -> float:
    """Nanoseconds of causal attention to all keys."""
    return problem.group * float(shown_pairs(problem.length, problem.length)) * rates.causal


def gather_cost(rates: Rates, problem: Problem) -> float:
    """Nanoseconds of the gather lowering; it does not depend on the gates."""
    if rates.gather is None:
        raise ValueError("rates: expected a rate of the gather lowering, got None")
    pairs = problem.group * float(gathered_pairs(problem.length, problem.capacity))
    return pairs * rates.gather + sorted_keys(problem.length) * rates.gather_selection


def flex_cost(rates: Rates, problem: Problem) -> float:
    """Nanoseconds of the flex lowering over the blocks that it visits."""
    if rates.flex is None:
        raise ValueError("rates: expected a rate of the flex lowering, got None")
    pairs = problem.group * problem.rho * float(shown_pairs(problem.length, problem.capacity))
    return pairs * rates.flex + sorted_keys(problem.length) * rates.flex_selection


COSTS: dict[str, Callable[[Rates, Problem], float]] = {"gather": gather_cost, "flex": flex_cost}


def sorted_keys(length: int) -> float:
    """N log2 N, to which the time of a selection is proportional."""
    return length * log2(max(2, length))
