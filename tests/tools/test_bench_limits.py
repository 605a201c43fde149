"""The benchmark's limits: cases that never end, that crash their process, that lose its GPU; and the GPU's clock."""

import contextlib
import os
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from flexdma.tools import timing
from flexdma.tools.bench import processes
from flexdma.tools.bench.processes import Ended, follow, measure_all
from flexdma.tools.bench.sections import Planned, Setting
from flexdma.tools.budget import Budget
from flexdma.tools.records import Results
from flexdma.tools.timing import LostDeviceError, Turns, interleaved, timed
from tests.tools.hand_moved_clock import HandMovedClock

SETTING = Setting("cpu", torch.float32, threads=1)
LONG = 1e6  # seconds


def silent(*news):
    """A tick."""


# In processes of their own.  These run in another process, so they are functions of this module.


def endless():
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(10)


def with_an_endless_one(setting, turns):
    return interleaved({"good": good, "endless": endless, "better": good}, turns, memory=False).rows()


def crashing(setting, turns):
    return interleaved({"good": good, "bad": os.abort, "worse": lose_the_device}, turns, memory=False).rows()


def good():
    return torch.ones(3) + 1


def fail() -> None:
    raise RuntimeError("CUDA error: the GPU takes no more calls")


def lose_the_device():
    timing.synchronise = fail
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def wrong(setting, turns):
    raise ZeroDivisionError("division by zero")


def threads(setting, turns):
    yield "torch", "threads", torch.get_num_threads()


def stop_silently(setting, turns):
    os._exit(3)


def with_a_child(setting, turns):
    """Reports its process id and that of a child process, as of a compiler."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"])
    turns.tick(f"{os.getpid()} {child.pid}")
    endless()


def measured(*cases, budget=LONG, progress=silent, save=silent):
    results = Results({"suite": "quick"})
    planned = [Planned("calls", case.__name__, case) for case in cases]
    measure_all(planned, results, SETTING, Turns(1, budget=Budget(budget)), save=save, progress=progress)
    return results


def is_running(pid):
    """Whether the process runs; a zombie has ended."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_ends_its_process_is_left_out_and_everything_else_is_measured():
    saved = []
    results = measured(crashing, wrong, stop_silently, threads, save=lambda results: saved.append(len(results.records)))
    (case, last) = results.cases("calls")
    assert case.metric("failed") == {
        "bad": "its process ended, SIGABRT",
        "worse": "RuntimeError: CUDA error: an illegal memory access was encountered; the GPU accepted no more calls",
    }
    assert case.metric("rounds") == {"good": 1}
    assert dict(results.whole_cases("failed")) == {
        "calls: wrong": "ZeroDivisionError: division by zero",
        "calls: stop_silently": "its process ended, exit code 3",
    }
    assert last.metric("threads") == {"torch": 1}
    assert saved == [4, 5, 6, 7]


def test_a_contender_that_never_ends_loses_its_share_and_no_other(monkeypatch):
    def progress(case, contender, done, of):  # the time limit ends only this contender, however slow the others are
        monkeypatch.setattr(processes, "GRACE", -LONG if contender == "endless" else LONG)

    results = measured(with_an_endless_one, progress=progress)
    (case,) = results.cases("calls")
    assert case.metric("failed") == {"endless": "stopped: used its share of the suite's time, 250000 seconds"}
    assert case.metric("rounds") == {"good": 1, "better": 1}


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_ctrl_c_leaves_finished_cases_whole_and_nothing_running():
    started: list[int] = []
    results = Results({"suite": "quick"})

    def progress(case, contender, done, of):
        if contender:
            started.extend(map(int, contender.split()))
            raise KeyboardInterrupt

    cases = [Planned("calls", case.__name__, case) for case in (threads, with_a_child)]
    saved = []
    with pytest.raises(KeyboardInterrupt):
        measure_all(
            cases, results, SETTING, Turns(1), progress=progress, save=lambda found: saved.append(found.to_json())
        )
    assert [record.shape for record in results.records] == ["threads"]
    assert len(saved) == 1
    for pid in started:
        wait_for_the_end_of(pid)


def wait_for_the_end_of(pid):
    while is_running(pid):
        time.sleep(0.01)


DRIVER = """
from tests.tools.test_bench_limits import measured, with_a_child
if __name__ == "__main__":
    measured(with_a_child, progress=lambda case, contender, done, of: print(contender, flush=True))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_no_process_outlives_the_command(tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py")]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        pids = next(line for line in process.stdout if line.strip()).split()
        process.kill()
    for pid in pids:
        wait_for_the_end_of(pid)


# What is heard of such a process


class Heard:
    """A connection that delivers these messages, each after its seconds, and is then silent or closed."""

    def __init__(self, clock, *messages, closed=False):
        self.clock, self.messages, self.closed = clock, list(messages), closed

    def poll(self, seconds):
        if self.messages and self.messages[0][0] <= seconds:
            self.clock.take(self.messages[0][0])
            return True
        self.clock.take(0 if self.closed else seconds)
        return self.closed

    def recv(self):
        if not self.messages:
            raise EOFError
        return self.messages.pop(0)[1:]


@pytest.mark.parametrize(
    ("messages", "closed", "ended", "seconds"),
    [
        ([(1, "contender", "a"), (2, "rows", [])], False, Ended([]), 3),
        ([(1, "failed", "why")], False, Ended([("", "failed", "why")]), 1),
        ([(1, "contender", "a"), (2, "lost", "why")], False, Ended(None, "why; the GPU accepted no more calls", "a"), 3),
        ([(1, "contender", "a")], True, Ended(None, "", "a"), 1),
        # The runs of one contender count together, those of other contenders separately.
        (
            [(1, "contender", "a"), (20, "contender", "b"), (20, "contender", "a")], False,
            Ended(None, "stopped: used its share of the suite's time, 25 seconds", "a"), 41 + 5 + processes.GRACE,
        ),
        (
            [(20, "contender", name) for name in "abcde"], False,
            Ended(None, "skipped: the suite's 100 seconds are used up", "e"), 100 + processes.GRACE,
        ),
    ],
)  # fmt: skip
def test_a_process_is_followed_to_its_end_or_to_a_limit(messages, closed, ended, seconds):
    clock = HandMovedClock()
    ticks: list[str] = []
    connection: Any = Heard(clock, *messages, closed=closed)
    assert follow(connection, Budget(100, clock), ticks.append) == ended
    assert clock() == seconds
    assert ticks == [message[2] for message in messages if message[1] == "contender"]


def test_cases_after_the_budget_are_skipped():
    results = measured(threads, wrong, budget=0)
    assert set(results.whole_cases("skipped")) == {
        (f"calls: {name}", "skipped: the suite's 0 seconds are used up") for name in ("threads", "wrong")
    }


def test_a_contender_that_is_left_out_does_not_run():
    measured = interleaved({"bad": endless, "good": good}, Turns(1, without={"bad": "it crashed"}), memory=False)
    assert measured.failed == {"bad": "it crashed"}
    assert measured.rounds == {"good": 1}


def test_a_lost_gpu_ends_the_case(monkeypatch):
    monkeypatch.setattr(timing, "synchronise", timing.synchronise)  # which the contender replaces
    with pytest.raises(LostDeviceError) as lost:
        interleaved({"illegal": lose_the_device, "next": lambda: None}, Turns(1), memory=False)
    assert lost.value.args == ("illegal", "RuntimeError: CUDA error: an illegal memory access was encountered")


# The GPU's clock


def test_a_gpu_is_timed_from_when_the_host_has_queued_the_call(monkeypatch):
    order: list[object] = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            order.append(self)

        def elapsed_time(self, other):
            assert (order[2], order[4]) == (self, other)
            return 1500.0

    for name, answer in {
        "is_available": lambda: True, "memory_allocated": lambda: 1, "Event": Event,
        "synchronize": lambda: order.append("wait"), "_sleep": lambda cycles: order.append("sleep"),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, answer)
    assert timed(lambda: order.append("call")) == 1.5
    assert order[:2] + order[3:4] + order[5:] == ["wait", "sleep", "call", "wait"]
    assert timed(lambda: None, host=True, now=iter([1.0, 4.0]).__next__) == 3.0
    assert order[6:] == ["wait", "wait"]
