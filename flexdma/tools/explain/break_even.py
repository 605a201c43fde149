"""Whether a lowering pays by the cost model, and from which length and up to which window it does."""

from dataclasses import replace

from flexdma.tools.cost_model.measured import COSTS, Problem, Rates, causal_cost

LONGEST = 2**24  # a break-even length beyond this is reported as none


def speedup(rates: Rates, lowering: str, problem: Problem) -> float:
    """How many times faster than causal attention to everything."""
    return causal_cost(rates, problem) / COSTS[lowering](rates, problem)


def break_even_length(rates: Rates, lowering: str, problem: Problem) -> int | None:
    """The shortest length from which this window pays; None where no length up to 2**24 does."""

    def pays(length: int) -> bool:
        return speedup(rates, lowering, replace(problem, length=length)) >= 1

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
        return speedup(rates, lowering, replace(problem, window=window)) >= 1

    if not pays(1):
        return None
    low, high = 1, problem.length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if pays(middle) else (low, middle - 1)
    return low
