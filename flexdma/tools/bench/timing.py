"""Timing: contenders interleaved, medians, under a budget of seconds; and peak memory.

One contender's failure (out of memory, a compile error, too slow) is recorded and does not lose the others.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from flexdma.tools.bench.limits import Budget, TimeIsUpError
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
    host: bool = False,
) -> Measured:
    """Median seconds of each contender over `rounds` rounds in which each runs once.

    Interleaving shares the machine's slow moments among all.  Two runs are not counted: the first (`warm_up`), which
    compiles, and one that measures `memory`.  Slow contenders run fewer times (SECONDS_EACH); a run under way is stopped
    where the budget is spent, or the contender's share of it, and none begins after.
    `tick(name)` precedes every run.  host: see `timed`.
    """
    budget = budget or Budget(float("inf"))
    clock = budget.clock
    measured, times = Measured(), {name: list[float]() for name in contenders}
    left = dict.fromkeys(contenders, budget.share)
    ended = {name: why for name, why in budget.refused.items() if name in contenders}  # those that run no more

    def attempt(name: str, step: Callable[[Contender], object]) -> None:
        tick(name)
        start = clock.now()
        try:
            # In this thread also where it goes backward: an alarm interrupts no other.
            with torch.autograd.set_multithreading_enabled(False):
                clock.within(min(left[name], budget.left), lambda: step(contenders[name]))
        except TimeIsUpError:
            ended[name] = budget.reason()  # and the runs before this one count
        except Exception as error:  # whatever a kernel, a compiler or a peer may raise
            ended[name] = in_one_line(error)
            times[name].clear()
        left[name] -= clock.now() - start
        # Not above, where the exception still holds what the contender has made.
        if name in ended:
            if is_lost():
                raise LostDeviceError(name, ended[name])
            release()

    def first(name: str, contender: Contender) -> None:
        if warm_up:
            timed(contender, host=host, now=clock.now)
        if memory:
            measured.peak_bytes[name] = peak_bytes(contender)

    def again(taken: list[float], contender: Contender) -> None:
        taken.append(timed(contender, host=host, now=clock.now))

    for name in contenders:
        if not (name in ended or budget.over):
            attempt(name, partial(first, name))
    for _ in range(rounds):
        for name, taken in times.items():
            slow = len(taken) >= LEAST and sum(taken) * (1 + 1 / len(taken)) > SECONDS_EACH
            if not (name in ended or slow or budget.over):
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
    prepared = () if not isinstance(contender, Prepared) else (contender.prepare(),)
    run = contender.run if isinstance(contender, Prepared) else contender
    synchronise()
    if host or not _on_cuda():
        start = now()
        run(*prepared)
        synchronise()
        return now() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    begin.record()
    run(*prepared)
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
