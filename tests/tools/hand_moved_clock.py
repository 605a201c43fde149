"""A clock for tests of the benchmark's limits, which only the test advances."""


class HandMovedClock:
    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time

    def take(self, seconds):
        self.time += seconds
