"""The search for the fastest candidate, and the timer of a call.

Each candidate takes turns with the default, and the ratio of their medians decides, so that a slow moment of the machine
slows both.  Selection, packing and masks are inside the timed call.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from flexdma.attention import dynamic_mask_attention
from flexdma.lowerings import tuned
from flexdma.lowerings.tuned import Key, Winner
from flexdma.tools.shapes import Shape, inputs
from flexdma.tools.timing import Turns, interleaved
from flexdma.tools.tune.candidates import Candidate
from flexdma.tools.whole_calls import as_steps, compile_whole

DEFAULT = "default"
# A winner needs less than this share of the default's time; the rest is noise.
LARGEST_SHARE = 0.98


class Timing(NamedTuple):
    """Median seconds of a candidate and, in the same run, of the default; or the reason of a failure."""

    seconds: float = 0.0
    default_seconds: float = 0.0
    failed: str = ""

    @property
    def share(self) -> float:
        """The candidate's time over the default's."""
        return self.seconds / self.default_seconds


Timer = Callable[[Candidate], Timing]


def search(
    key: Key,
    candidates: Iterable[Candidate],
    timer: Timer,
    keep: Callable[[Winner], object],
    report: Callable[[Candidate, Timing], object] = lambda candidate, timing: None,
) -> Winner | None:
    """The fastest candidate; None where the default is as fast.

    keep: called with each candidate that is faster than all before, so that an interruption loses none.
    """
    best, least = None, LARGEST_SHARE
    for candidate in candidates:
        timing = timer(candidate)
        report(candidate, timing)
        if not timing.failed and timing.share < least:
            least = timing.share
            best = Winner(key, candidate.block_size, dict(candidate.kernel_options), *timing[:2])
            keep(best)
    return best


@contextmanager
def without_winners() -> Iterator[None]:
    """While active, the default has no winners of an earlier run."""
    before = os.environ.get(tuned.VARIABLE)
    os.environ[tuned.VARIABLE] = ""
    try:
        yield
    finally:
        os.environ.pop(tuned.VARIABLE)
        if before is not None:
            os.environ[tuned.VARIABLE] = before


def timer_of(shape: Shape, device: str, dtype: torch.dtype, rounds: int) -> Timer:
    """The timer of whole calls of this shape by the flex lowering, forward or forward and backward."""
    tensors = inputs(shape, device, dtype)
    compiled = compile_whole(dynamic_mask_attention)

    def step(candidate: Candidate | None) -> Callable[[], None]:
        options: dict[str, Any] = {}
        if candidate is not None:
            options = {"block_size": candidate.block_size, "kernel_options": dict(candidate.kernel_options) or None}
        call = partial(compiled, *tensors, window_size=shape.window, lowering="flex", **options)
        return as_steps({DEFAULT: call}, shape, tensors)[DEFAULT]

    def timer(candidate: Candidate) -> Timing:
        # Each candidate is one more compilation of the same function.
        with torch._dynamo.config.patch(recompile_limit=1000, accumulated_recompile_limit=10000):
            measured = interleaved({DEFAULT: step(None), candidate.name: step(candidate)}, Turns(rounds), memory=False)
        if measured.failed:
            return Timing(failed="; ".join(f"{name}: {why}" for name, why in measured.failed.items()))
        return Timing(measured.seconds[candidate.name], measured.seconds[DEFAULT])

    return timer
