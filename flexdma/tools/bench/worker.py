"""A suite in a process of its own, and in a new one where that one comes to grief.

A GPU on which a kernel has failed fails every later call of its process, a compiler or a driver may crash, and nothing in
Python interrupts a kernel that never returns.  Each costs the contender that ran: it is recorded with the reason, its case
begins anew without it, and the cases after it lose nothing.
"""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from flexdma.tools.bench.contenders import Compile, compile_whole
from flexdma.tools.bench.limits import GRACE, Budget
from flexdma.tools.bench.measure import Progress, measure
from flexdma.tools.bench.suites import Suite
from flexdma.tools.bench.timing import LostDeviceError

# Seconds beyond the limits that a process keeps by itself, after which it is killed.
PATIENCE = 2 * GRACE


class _Running(NamedTuple):
    """What the process was at when last heard of."""

    case: str
    contender: str  # "": none
    number: int  # of the case


def measure_apart(
    suite: Suite,
    results: dict[str, Any],
    *,
    rounds: int,
    dtype: torch.dtype,
    device: str,
    budget: Budget,
    compiler: Compile = compile_whole,
    save: Callable[[dict[str, Any]], None] = lambda results: None,
    progress: Progress = lambda case, contender, done, of: None,
) -> None:
    """`measure`, in other processes."""
    context = multiprocessing.get_context("spawn")
    options: dict[str, Any] = {
        "rounds": rounds,
        "dtype": dtype,
        "device": device,
        "budget": budget,
        "compiler": compiler,
    }
    start = 0
    while not budget.over:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sender, suite, results, options | {"start": start}))
        process.start()
        sender.close()
        try:
            running, why = _follow(receiver, results, budget, save, progress)
            if not why:
                process.join(PATIENCE)
        finally:
            process.kill()
            process.join()
        if why is None:
            return
        why = why or f"its process ended, {_ending(process.exitcode)}"
        if running is None:
            results["failed"]["the process that measures"] = why
            save(results)
            return
        start = running.number
        if running.contender:
            budget.refused[running.contender] = why
        else:
            results["failed"][running.case] = why
            budget.refused = {}
            start += 1
    measure(suite, results, **options, start=start, save=save, progress=progress)  # which lists the others as skipped


def _follow(
    receiver: Connection, results: dict[str, Any], budget: Budget, save: Callable, progress: Progress
) -> tuple[_Running | None, str | None]:
    """Hear of the process to its end: what it was at, if it began, and why it ended: None all done, "" not known."""
    running = None
    while receiver.poll(max(0, min(budget.left, budget.share)) + PATIENCE):
        try:
            kind, *news = receiver.recv()
        except EOFError:
            return running, ""
        if kind == "done":
            return running, None
        if kind == "lost":
            return running, f"{news[0]}; the GPU took no more calls"
        if kind == "results":
            results.update(news[0])
            save(results)
        else:
            case, contender, done, of = news
            running = _Running(case, contender, done)
            progress(case, contender, done, of)
    return running, budget.reason()


def _work(sender: Connection, suite: Suite, results: dict[str, Any], options: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to answer
    try:
        measure(
            suite,
            results,
            **options,
            save=lambda results: sender.send(("results", results)),
            progress=lambda *news: sender.send(("progress", *news)),
        )
        sender.send(("done",))
    except LostDeviceError as error:
        sender.send(("lost", error.args[1]))


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
