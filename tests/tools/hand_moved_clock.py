"""A clock for the benchmark's limits that only a test advances."""


class HandMovedClock:
    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time

    def take(self, seconds):
        self.time += seconds
