"""Limits of time: a suite's seconds, a contender's share of them, and an alarm that interrupts a call that exceeds either."""

import signal
import threading
import time
from collections.abc import Callable
from math import isinf
from typing import TypeVar

# Of a suite's seconds, for all runs of one contender in one case: one slow compilation does not eat the suite.
SHARE = 1 / 4
# An alarm that something has swallowed (a destructor, a bare except) rings again after so many seconds.
AGAIN = 1.0
# Seconds beyond the budget for what a case does besides running its contenders.
GRACE = 5.0
Result = TypeVar("Result")


class TimeIsUpError(BaseException):
    """Raised inside a call whose time is up.  Not an Exception: a compiler would catch that and go on another way."""


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """call(), interrupted by TimeIsUpError when the seconds have passed.

    Python interrupts only the main thread, between two instructions, and only systems with timers (not Windows): elsewhere,
    and while a library does not return, a call takes as long as it takes.  May be nested: the shorter limit holds.
    """
    cannot = not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread()
    if cannot or isinf(seconds):
        return call()
    outer, interval = signal.getitimer(signal.ITIMER_REAL)
    if 0 < outer <= seconds:
        return call()
    handler, start = signal.signal(signal.SIGALRM, _ring), time.monotonic()
    # Twice: should the alarm ring while the inner one stops it, the outer one does.
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6), AGAIN)
            return call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - start), 1e-6), interval)


def _ring(number: int, frame: object) -> None:
    raise TimeIsUpError


class Clock:
    """Counts seconds and interrupts calls, in real time.  Tests replace it with a clock that they advance."""

    now = staticmethod(time.perf_counter)
    within = staticmethod(within)


class Budget:
    """Seconds that a suite may take, counted from now.

    refused: contenders that must not run, and why: they have brought down a process before this one.
    clock: counts the seconds and interrupts calls.
    """

    def __init__(self, seconds: float, refused: dict[str, str] | None = None, clock: Clock | None = None) -> None:
        self.seconds, self.clock = seconds, clock or Clock()
        self.end = self.clock.now() + seconds
        self.refused = refused or {}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - self.clock.now()

    @property
    def over(self) -> bool:
        """Whether they are spent."""
        return self.left <= 0

    @property
    def share(self) -> float:
        """Seconds that one contender may take."""
        return self.seconds * SHARE

    def reason(self) -> str:
        """Why something was stopped now, or not begun."""
        if self.over:
            return f"skipped: the suite's {self.seconds:g} seconds are spent"
        return f"stopped: took its share of the suite's time, {self.share:g} seconds"
