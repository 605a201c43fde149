"""A clock for the benchmark's limits that only a test advances."""

from math import inf

from flexdma.tools.bench.limits import Clock, TimeIsUpError


class HandMovedClock(Clock):
    def __init__(self):
        self.time, self.alarms = 0.0, []

    def now(self):
        return self.time

    def within(self, seconds, call):
        self.alarms.append(self.time + seconds)
        try:
            return call()
        finally:
            self.alarms.pop()

    def take(self, seconds=inf):
        """Advance by these seconds, or to the first alarm before that, which raises."""
        rings = min(self.alarms, default=inf)
        self.time = min(self.time + seconds, rings)
        if self.time == rings:
            raise TimeIsUpError
