"""Compile the cases of a suite before they are measured, several at a time.

Most of a GPU suite's time is compilation, and most of that in one thread.  Each case runs once in a process of its own,
beside others, and what it measures is dropped; the measurement then finds its kernels in Inductor's cache.
"""

from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

from flexdma.tools.bench.processes import LONGEST_WAIT, killed, started
from flexdma.tools.bench.sections import Planned, Setting
from flexdma.tools.budget import Budget
from flexdma.tools.timing import Turns


def compile_ahead(
    cases: Sequence[Planned],
    setting: Setting,
    budget: Budget,
    processes: int,
    progress: Callable[[str, int, int], None] = lambda case, done, of: None,
) -> None:
    """Run each case once, `processes` of them at a time, until all have ended or the budget is used up.

    progress: called with a case, the number of ended ones and the number of all.  No process outlives this call.
    """
    waiting, running = list(cases), dict[Any, tuple[Any, Planned]]()
    turns = Turns(1, budget=budget)
    try:
        while (waiting or running) and not budget.over:
            while waiting and len(running) < processes:
                case = waiting.pop(0)
                process, connection = started(case, setting, turns)
                running[connection] = process, case
            for ready in wait(list(running), timeout=max(0.0, min(budget.left, LONGEST_WAIT))):
                process, case = running[ready]
                if _has_ended(ready):
                    del running[ready]
                    killed(process)
                    progress(str(case), len(cases) - len(waiting) - len(running), len(cases))
    finally:
        for process, _ in running.values():
            killed(process)


def _has_ended(connection: Any) -> bool:
    """Receive one message; whether the case sends no more."""
    try:
        kind, _ = connection.recv()
    except EOFError:
        return True
    return kind != "contender"
