"""Timing: contenders interleaved, medians; and peak memory."""

import statistics
import time
from collections.abc import Callable

import torch


def interleaved(
    contenders: dict[str, Callable[[], object]], rounds: int, tick: Callable[[str], None]
) -> dict[str, float]:
    """Median seconds of each contender over `rounds` rounds in which each runs once, after one round that is not counted.

    Interleaving shares the machine's slow moments among all; the first round compiles.  `tick(name)` follows every run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            _synchronise()
            start = time.perf_counter()
            contender()
            _synchronise()
            if number:
                seconds[name].append(time.perf_counter() - start)
            tick(name)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that PyTorch held at any moment of the call, above what it held before."""
    if torch.cuda.is_available():
        _synchronise()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        _synchronise()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
