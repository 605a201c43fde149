"""Time limits: the seconds of a suite, and the share of one contender."""

import time
from collections.abc import Callable
from math import inf

# Share of a suite's seconds for all runs of one contender in one case, so that one slow compilation does not use them all.
SHARE = 1 / 4


class Budget:
    """The seconds of a suite, counted from now.  All processes of the machine share the clock."""

    def __init__(self, seconds: float = inf, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.now = seconds, now
        self.end = now() + seconds

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.end - self.now()

    @property
    def over(self) -> bool:
        """Whether the seconds are used up."""
        return self.left <= 0

    @property
    def share(self) -> float:
        """Seconds for one contender of a case."""
        return self.seconds * SHARE

    def reason(self) -> str:
        """The reason for a contender that was stopped now, or did not begin."""
        if self.over:
            return f"skipped: the suite's {self.seconds:g} seconds are used up"
        return f"stopped: used its share of the suite's time, {self.share:g} seconds"
