"""Timing of interleaved contenders by medians, within a budget of seconds; and peak memory.

A contender's failure (out of memory, a compile error, too slow) is recorded, and the others continue.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from flexdma.tools.budget import Budget
from flexdma.tools.machine import synchronise

# A contender runs until its runs have taken this many seconds, but at least LEAST times.
SECONDS_EACH = 12.0
LEAST = 3
# Rounds of cases of which a suite has many.
SIZE_ROUNDS = 3
# Cycles that a GPU waits before each timed call, 10 ms at 2 GHz, so that the host queues the call before it begins.
HEAD_START = 20_000_000


class UnavailableError(Exception):
    """Raised by a contender that cannot run here.  Only its message is reported."""


class LostDeviceError(BaseException):
    """After a failed kernel every later call of the process fails on the GPU.  args: contender, reason."""


@dataclass(frozen=True)
class Prepared:
    """A contender of which only `run` is timed, each time on a new result of `prepare`."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]


Contender = Callable[[], object] | Prepared


@dataclass(frozen=True)
class Turns:
    """How contenders take turns.

    rounds: runs of each.  tick: called with the contender's name before every run.  budget: time limits.
    without: contender -> reason, for contenders that do not run.
    """

    rounds: int
    tick: Callable[[str], None] = lambda name: None
    budget: Budget = field(default_factory=Budget)
    without: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Measured:
    """By contender: median seconds, number of runs, peak bytes, and the reason of a failure."""

    seconds: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[str, str, Any]]:
        """Rows (contender, metric, value)."""
        for metric, values in vars(self).items():
            for name, value in values.items():
                yield name, metric, value


def interleaved(
    contenders: Mapping[str, Contender], turns: Turns, *, memory: bool = True, warm_up: bool = True, host: bool = False
) -> Measured:
    """Median seconds of each contender over `turns.rounds` rounds in which each runs once.

    Interleaving distributes the slow moments of the machine over all contenders.  Two runs are not counted: the first
    (`warm_up`), which compiles, and one that measures `memory`.  Slow contenders run fewer times (SECONDS_EACH).  No run
    begins that would exceed the budget, or the contender's share of it, if it took as long as the run before.
    host: see `timed`.
    """
    budget = turns.budget
    measured, times = Measured(), {name: list[float]() for name in contenders}
    spent = dict.fromkeys(contenders, 0.0)
    ended = {name: why for name, why in turns.without.items() if name in contenders}  # contenders that no longer run

    def attempt(name: str, step: Callable[[Contender], object]) -> None:
        needed = times[name][-1] if times[name] else 0.0
        if name in ended or budget.over or needed > min(budget.left, budget.share - spent[name]):
            return
        turns.tick(name)
        start = budget.now()
        try:
            step(contenders[name])
        except Exception as error:  # kernels, compilers and peers may raise anything
            ended[name] = in_one_line(error)
            times[name].clear()
        spent[name] += budget.now() - start
        # Not inside `except`, where the exception still holds the contender's tensors.
        if name in ended:
            if is_lost():
                raise LostDeviceError(name, ended[name])
            release()

    def first(name: str, contender: Contender) -> None:
        if warm_up:
            timed(contender, host=host)
        if memory:
            measured.peak_bytes[name] = peak_bytes(contender)

    def again(taken: list[float], contender: Contender) -> None:
        taken.append(timed(contender, host=host, now=budget.now))

    for name in contenders:
        attempt(name, partial(first, name))
    for _ in range(turns.rounds):
        for name, taken in times.items():
            if len(taken) < LEAST or sum(taken) * (1 + 1 / len(taken)) <= SECONDS_EACH:
                attempt(name, partial(again, taken))
    for name, taken in times.items():
        if taken:
            measured.seconds[name], measured.rounds[name] = statistics.median(taken), len(taken)
        else:
            measured.failed[name] = ended.get(name) or budget.reason()
    return measured


def timed(contender: Contender, *, host: bool = False, now: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one run, which includes compilation if it is the first.

    On a GPU the GPU's clock measures it, from when the host has had time to queue the call, as in a model whose host is
    ahead of its GPU.  host: the host's clock `now` measures it, from the call until the GPU has finished.
    """
    run = _prepared(contender)
    synchronise()
    if host or not _on_cuda():
        start = now()
        run()
        synchronise()
        return now() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    begin.record()
    run()
    end.record()
    synchronise()
    return begin.elapsed_time(end) / 1e3


def backward_of(output: torch.Tensor, inputs: Iterable[torch.Tensor]) -> None:
    """Compute the gradients of inputs that require one, for a cotangent of ones, without changing any .grad."""
    needed = [tensor for tensor in inputs if tensor.requires_grad]
    torch.autograd.grad(output, needed, torch.ones_like(output), allow_unused=True)


def in_one_line(error: BaseException) -> str:
    """Type and first line of the message, because messages of compilers have thousands of lines."""
    if isinstance(error, UnavailableError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def peak_bytes(contender: Contender) -> int:
    """Peak memory of PyTorch during the call, minus its memory before."""
    run = _prepared(contender)
    if _on_cuda():
        synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronise()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints two lines each time
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _prepared(contender: Contender) -> Callable[[], object]:
    return partial(contender.run, contender.prepare()) if isinstance(contender, Prepared) else contender


def _on_cuda() -> bool:
    """Whether tensors are on a GPU; a machine with a GPU may also measure its CPU."""
    return torch.cuda.is_available() and torch.cuda.memory_allocated() > 0


def is_lost() -> bool:
    """Whether the GPU accepts no more calls of this process."""
    try:
        synchronise()
    except Exception:  # the class depends on the version of torch
        return True
    return False


def release() -> None:
    """Free the memory of a finished case or a failed contender."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
