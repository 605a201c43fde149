"""The benchmark's limits: calls that never end, that bring their process down, that cost it its GPU; and the GPU's clock."""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
import weakref
from functools import partial

import pytest
import torch

from flexdma.__main__ import main
from flexdma.tools.bench import command, limits, measure, timing, worker
from flexdma.tools.bench.contenders import COMPILED, EAGER
from flexdma.tools.bench.limits import Budget, TimeIsUpError, within
from flexdma.tools.bench.shapes import Shape
from flexdma.tools.bench.suites import Suite
from flexdma.tools.bench.timing import LostDeviceError, interleaved, timed
from tests.hand_moved_clock import HandMovedClock

OPTIONS = {"rounds": 1, "dtype": torch.float32, "device": "cpu"}
LONG = 1e6  # seconds; a limit of none at all sets no alarm


def silent(name):
    """A tick."""


def endless():
    while True:
        pass


def stubborn():
    """Ends neither, and takes every exception for an error of its own."""
    while True:
        with contextlib.suppress(Exception):
            time.sleep(10)


def interrupted():
    """Never ends; the alarm rings while it runs, however long that took to begin."""
    signal.raise_signal(signal.SIGALRM)
    endless()


# The alarm


@pytest.mark.parametrize("call", [endless, stubborn])
def test_a_call_that_never_ends_is_interrupted(call):
    with pytest.raises(TimeIsUpError):
        within(0.1, call)


def test_an_alarm_that_is_swallowed_rings_again(monkeypatch):
    monkeypatch.setattr(limits, "AGAIN", 0.05)
    swallowed = []

    def deaf_once():
        try:
            endless()
        except TimeIsUpError:
            swallowed.append(1)
        endless()

    while not swallowed:  # the alarm may ring before the call has begun
        with pytest.raises(TimeIsUpError):
            within(0.05, deaf_once)


def test_the_shorter_of_two_limits_holds_and_no_alarm_is_left():
    def inner():
        with pytest.raises(TimeIsUpError):
            within(0.05, endless)
        return within(LONG, endless)  # the outer one ends it

    with pytest.raises(TimeIsUpError):
        within(0.3, inner)
    assert within(LONG, lambda: within(2 * LONG, lambda: 3)) == 3
    assert limits.signal.getitimer(limits.signal.ITIMER_REAL) == (0, 0)
    assert limits.signal.getsignal(limits.signal.SIGALRM) == limits.signal.SIG_DFL


def test_other_threads_run_without_an_alarm():
    found = []
    thread = threading.Thread(target=lambda: found.append(within(0.01, lambda: time.sleep(0.1) or 3)))
    thread.start()
    thread.join()
    assert found == [3]


def test_a_compilation_is_interrupted_and_the_next_one_works():
    def slow_backend(graph, inputs):
        return interrupted()

    with pytest.raises(TimeIsUpError):
        within(LONG, lambda: torch.compile(torch.sin, backend=slow_backend)(torch.ones(3)))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(torch.sin, backend="eager")(torch.ones(3)), torch.ones(3).sin())


def test_a_backward_is_interrupted():
    class Endless(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return interrupted()

    output = Endless.apply(torch.ones(3, requires_grad=True))
    measured = interleaved({"a": lambda: output.sum().backward()}, 1, silent, Budget(LONG), memory=False)
    assert "share of the suite's time, 250000 seconds" in measured.failed["a"]


# In the benchmark


def test_a_contender_that_never_ends_loses_its_share_and_no_other():
    clock = HandMovedClock()
    runs = {"endless": clock.take, "slower": lambda: clock.take(0.6), "good": lambda: clock.take(0.2)}
    measured = interleaved(runs, 5, silent, Budget(6, clock=clock), memory=False)
    assert measured.failed == {"endless": "stopped: took its share of the suite's time, 1.5 seconds"}
    assert measured.rounds == {"slower": 1, "good": 5}  # one run more of each is not counted


def test_what_a_failed_contender_held_is_gone_when_memory_is_released(monkeypatch):
    held, gone = [], []

    def fails():
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timing, "release", lambda: gone.append(held[0]() is None))
    measured = interleaved({"fails": fails}, 1, silent, memory=False)
    assert measured.failed == {"fails": "OutOfMemoryError: CUDA out of memory"}
    assert gone == [True]


def test_a_suite_whose_time_is_up_in_a_call_is_written_down(monkeypatch, tmp_path, capsys):
    clock = HandMovedClock()
    monkeypatch.setattr(command, "Budget", partial(Budget, clock=clock))
    monkeypatch.setattr(measure, "contenders", lambda *arguments: {"good": lambda: None, "endless": clock.take})
    monkeypatch.setattr(limits, "SHARE", 1)
    assert main(["bench", "--suite", "quick", "--budget", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "bench-quick.json").read_text())
    spent = "skipped: the suite's 1 seconds are spent"
    assert results["calls"][0]["failed"] == {"good": spent, "endless": spent}
    assert "calls: forward + backward, N=2048 w=128" in results["skipped"]
    printed = capsys.readouterr().out
    assert f"| forward, N=4096 w=256 | endless | {spent} |" in printed


def test_a_case_without_contenders_is_interrupted_too(monkeypatch):
    clock = HandMovedClock()
    monkeypatch.setattr(measure, "_packing", lambda *arguments: clock.take())
    suite = Suite("cpu", "float32", 1, calls=(Shape(32, 4, False),))
    results = measure.begun(suite, "quick", 1, "float32", "cpu")
    budget = Budget(1, clock=clock)
    measure.measure(suite, results, **OPTIONS, budget=budget, compiler=lambda function: function, start=1)
    assert results["skipped"][0] == "packing: 128 x 128"
    assert clock.now() == 1 + limits.GRACE


# In processes of their own


def crashing(function, mode=None):
    """A compiler whose code brings the process down."""
    return lambda *arguments, **options: os.abort()


def test_what_ends_its_process_is_left_out_and_the_others_are_measured(monkeypatch):
    monkeypatch.setattr(worker, "PATIENCE", LONG)
    suite = Suite("cpu", "float32", 1, calls=(Shape(64, 8, False),), packing=(256, 16))
    results = measure.begun(suite, "quick", 1, "float32", "cpu")
    saved = []
    worker.measure_apart(suite, results, **OPTIONS, budget=Budget(LONG), compiler=crashing, save=saved.append)
    (case,) = results["calls"]
    assert case["failed"] == {COMPILED: "its process ended, SIGABRT"}
    assert case["seconds"][EAGER] > 0
    assert len(results["packing"]) == 3
    assert not results["failed"]
    assert not results["skipped"]
    assert saved[-1] is results


@pytest.fixture
def ends(monkeypatch):
    """What a process that measures has to say, and where it is heard."""
    monkeypatch.setattr(worker, "PATIENCE", 0.1)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    sender.send(("progress", "calls: a", "b", 3, 9))
    return receiver, sender


def heard(receiver, budget):
    heard_of = []
    running, why = worker._follow(receiver, {}, budget, None, lambda *news: heard_of.append(news))
    assert heard_of == [("calls: a", "b", 3, 9)]
    assert running == ("calls: a", "b", 3)
    return why


def test_a_process_that_says_nothing_any_more_is_given_up(ends):
    receiver, _sender = ends
    # Given up after real seconds, by a clock that stands still: the suite's time is not over.
    assert (
        heard(receiver, Budget(0.4, clock=HandMovedClock()))
        == "stopped: took its share of the suite's time, 0.1 seconds"
    )


def test_a_process_that_ends_without_a_word_is_noticed(ends):
    receiver, sender = ends
    sender.close()
    assert heard(receiver, Budget(LONG)) == ""


def test_a_process_without_its_gpu_says_so(ends, monkeypatch):
    def lose(*arguments, **options):
        raise LostDeviceError("b", "an illegal memory access")

    receiver, sender = ends
    monkeypatch.setattr(worker, "measure", lose)
    monkeypatch.setattr(worker.signal, "signal", lambda *arguments: None)
    worker._work(sender, None, {}, {})
    assert heard(receiver, Budget(LONG)) == "an illegal memory access; the GPU took no more calls"


def test_a_lost_gpu_ends_the_case(monkeypatch):
    def illegal():
        monkeypatch.setattr(timing, "synchronise", lambda: 1 / 0)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(LostDeviceError) as lost:
        interleaved({"illegal": illegal, "next": lambda: None}, 1, silent, memory=False)
    assert lost.value.args == ("illegal", "RuntimeError: CUDA error: an illegal memory access was encountered")


# The GPU's clock


def test_a_gpu_is_timed_from_when_the_host_has_queued_the_call(monkeypatch):
    order = []

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
