"""Timing: contenders interleaved, medians, under a budget of seconds; and peak memory.

One contender's failure (out of memory, a compile error) is recorded and does not lose the others.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

# A contender is run at most until its own runs have taken this long, but at least LEAST times.
SECONDS_EACH = 12.0
LEAST = 3
OUT_OF_TIME = "skipped: time"


class UnavailableError(Exception):
    """Raised by a contender that cannot run here: its message, alone, is reported."""


class Budget:
    """Seconds that may be spent, counted from now."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def over(self) -> bool:
        """Whether they are spent."""
        return time.monotonic() >= self.end


@dataclass(frozen=True)
class Prepared:
    """A contender of which only `run` is timed: each time on what `prepare` has just made."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]


Contender = Callable[[], object] | Prepared


@dataclass
class Measured:
    """By contender: median seconds, how many runs they are of, peak bytes; and why there are none."""

    seconds: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def interleaved(
    contenders: Mapping[str, Contender],
    rounds: int,
    tick: Callable[[str], None],
    budget: Budget | None = None,
    *,
    memory: bool = True,
    warm_up: bool = True,
) -> Measured:
    """Median seconds of each contender over `rounds` rounds in which each runs once.

    Interleaving shares the machine's slow moments among all.  Two runs are not counted: the first (`warm_up`), which
    compiles, and one that measures `memory`.  Slow contenders run fewer times (SECONDS_EACH), and none after the budget
    is spent.
    `tick(name)` precedes every run.
    """
    measured, times = Measured(), dict[str, list[float]]()
    for name, contender in contenders.items():
        if budget is not None and budget.over:
            measured.failed[name] = OUT_OF_TIME
            continue
        tick(name)
        try:
            if warm_up:
                _timed(contender)
            if memory:
                measured.peak_bytes[name] = peak_bytes(contender)
            times[name] = []
        except Exception as error:  # whatever a kernel, a compiler or a peer may raise
            measured.failed[name] = in_one_line(error)
            release()
    for _ in range(rounds):
        for name in list(times):
            taken = times[name]
            slow = len(taken) >= LEAST and sum(taken) * (1 + 1 / len(taken)) > SECONDS_EACH
            if slow or (budget is not None and budget.over):
                continue
            tick(name)
            try:
                taken.append(_timed(contenders[name]))
            except Exception as error:
                measured.failed[name] = in_one_line(error)
                del times[name]
                release()
    for name, taken in times.items():
        if taken:
            measured.seconds[name], measured.rounds[name] = statistics.median(taken), len(taken)
        else:
            measured.failed[name] = OUT_OF_TIME
    return measured


def _timed(contender: Contender) -> float:
    prepared = () if not isinstance(contender, Prepared) else (contender.prepare(),)
    run = contender.run if isinstance(contender, Prepared) else contender
    synchronise()
    start = time.perf_counter()
    run(*prepared)
    synchronise()
    return time.perf_counter() - start


def in_one_line(error: BaseException) -> str:
    """Type and first line of the message: compilers print thousands."""
    if isinstance(error, UnavailableError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def peak_bytes(contender: Contender) -> int:
    """The most memory that PyTorch held at any moment of the call, above what it held before."""
    prepared = () if not isinstance(contender, Prepared) else (contender.prepare(),)
    run = contender.run if isinstance(contender, Prepared) else contender
    if _on_cuda():
        synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*prepared)
        synchronise()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        run(*prepared)
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _on_cuda() -> bool:
    """Whether the tensors of the contenders are on a GPU; there may be one while a CPU is measured."""
    return torch.cuda.is_available() and torch.cuda.memory_allocated() > 0


def synchronise() -> None:
    """Wait for what the GPU is still computing, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def release() -> None:
    """Free what a case, or a failed contender, leaves behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
