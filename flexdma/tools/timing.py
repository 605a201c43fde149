"""Timing: contenders interleaved, medians, under a budget of seconds; and peak memory.

One contender's failure (out of memory, a compile error, too slow) is recorded and does not lose the others.
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

# A contender is run at most until its own runs have taken this long, but at least LEAST times.
SECONDS_EACH = 12.0
LEAST = 3
# Cycles that a GPU waits before each timed call, 10 ms at 2 GHz, so that the host has queued the call when it begins.
HEAD_START = 20_000_000


class UnavailableError(Exception):
    """Raised by a contender that cannot run here: its message, alone, is reported."""


class LostDeviceError(BaseException):
    """A GPU on which a kernel has failed fails every later call of its process, whatever it is: (contender, why)."""


@dataclass(frozen=True)
class Prepared:
    """A contender of which only `run` is timed: each time on what `prepare` has just made."""

    prepare: Callable[[], Any]
    run: Callable[[Any], object]


Contender = Callable[[], object] | Prepared


@dataclass(frozen=True)
class Turns:
    """How contenders take turns: rounds, the time they may take, and who is left out and why.

    `tick(name)` is called before every run.
    """

    rounds: int
    tick: Callable[[str], None] = lambda name: None
    budget: Budget = field(default_factory=Budget)
    without: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Measured:
    """By contender: median seconds, how many runs they are of, peak bytes; and why there are none."""

    seconds: dict[str, float] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[str, str, Any]]:
        """(contender, metric, value)."""
        for metric, values in vars(self).items():
            for name, value in values.items():
                yield name, metric, value


def interleaved(
    contenders: Mapping[str, Contender], turns: Turns, *, memory: bool = True, warm_up: bool = True, host: bool = False
) -> Measured:
    """Median seconds of each contender over `turns.rounds` rounds in which each runs once.

    Interleaving shares the machine's slow moments among all.  Two runs are not counted: the first (`warm_up`), which
    compiles, and one that measures `memory`.  Slow contenders run fewer times (SECONDS_EACH).  No run begins that would,
    if it took as long as the one before, exceed the budget or the contender's share of it.  host: see `timed`.
    """
    budget = turns.budget
    measured, times = Measured(), {name: list[float]() for name in contenders}
    spent = dict.fromkeys(contenders, 0.0)
    ended = {name: why for name, why in turns.without.items() if name in contenders}  # those that run no more

    def attempt(name: str, step: Callable[[Contender], object]) -> None:
        needed = times[name][-1] if times[name] else 0.0
        if name in ended or budget.over or needed > min(budget.left, budget.share - spent[name]):
            return
        turns.tick(name)
        start = budget.now()
        try:
            step(contenders[name])
        except Exception as error:  # whatever a kernel, a compiler or a peer may raise
            ended[name] = in_one_line(error)
            times[name].clear()
        spent[name] += budget.now() - start
        # Not above, where the exception still holds what the contender has made.
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
    """Seconds of one run, compiled already or not.

    On a GPU by its own clock, which starts when the host has had time to queue the call: what the GPU needs, and what a
    model sees whose host is ahead of it.  host: by the host's clock `now`, from the call until the GPU has finished.
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
    """The gradients of those inputs that need one, for a cotangent of ones; not added to any that were there before."""
    needed = [tensor for tensor in inputs if tensor.requires_grad]
    torch.autograd.grad(output, needed, torch.ones_like(output), allow_unused=True)


def in_one_line(error: BaseException) -> str:
    """Type and first line of the message: compilers print thousands."""
    if isinstance(error, UnavailableError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def peak_bytes(contender: Contender) -> int:
    """The most memory that PyTorch held at any moment of the call, above what it held before."""
    run = _prepared(contender)
    if _on_cuda():
        synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronise()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints two lines each time
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
    """Whether the tensors of the contenders are on a GPU; there may be one while a CPU is measured."""
    return torch.cuda.is_available() and torch.cuda.memory_allocated() > 0


def is_lost() -> bool:
    """Whether the GPU takes no more calls of this process."""
    try:
        synchronise()
    except Exception:  # torch's own class, where it has one
        return True
    return False


def release() -> None:
    """Free what a case, or a failed contender, leaves behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
