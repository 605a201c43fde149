"""Limits of time: a suite's seconds, and one contender's share of them."""

import time
from collections.abc import Callable
from math import inf

# Of a suite's seconds, for all runs of one contender in one case: one slow compilation does not eat the suite.
SHARE = 1 / 4


class Budget:
    """Seconds that a suite may take, counted from now.  The clock is one for all processes of the machine."""

    def __init__(self, seconds: float = inf, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.now = seconds, now
        self.end = now() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - self.now()

    @property
    def over(self) -> bool:
        """Whether they are spent."""
        return self.left <= 0

    @property
    def share(self) -> float:
        """Seconds that one contender of a case may take."""
        return self.seconds * SHARE

    def reason(self) -> str:
        """Why something was stopped now, or not begun."""
        if self.over:
            return f"skipped: the suite's {self.seconds:g} seconds are spent"
        return f"stopped: took its share of the suite's time, {self.share:g} seconds"
