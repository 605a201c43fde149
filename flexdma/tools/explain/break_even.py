"""The predicted speed-up of a lowering, and the lengths and windows at which it pays."""

from dataclasses import replace

from flexdma.tools.cost_model.measured import COSTS, Problem, Rates, causal_cost

LONGEST = 2**24  # a longer break-even length is reported as none


def speedup(rates: Rates, lowering: str, problem: Problem) -> float:
    """The time of causal attention to all keys over that of the lowering."""
    return causal_cost(rates, problem) / COSTS[lowering](rates, problem)


def break_even_length(rates: Rates, lowering: str, problem: Problem) -> int | None:
    """The shortest length from which this window pays; None if it pays at no length up to 2**24."""

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
    """The widest window that pays at this length, at most the length; None if even a window of 1 does not pay."""

    def pays(window: int) -> bool:
        return speedup(rates, lowering, replace(problem, window=window)) >= 1

    if not pays(1):
        return None
    low, high = 1, problem.length
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if pays(middle) else (low, middle - 1)
    return low
