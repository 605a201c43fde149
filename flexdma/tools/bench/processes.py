"""Each case of a suite in a process of its own, with a limit of time.

A GPU on which a kernel has failed fails every later call of its process, a compiler or a driver may crash, and nothing in
Python interrupts a kernel that never returns.  Each costs the contender that ran: it is recorded with the reason, its case
begins anew without it, and the cases after it lose nothing.  No process outlives this one.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from flexdma.tools.bench.sections import Planned, Row, Setting
from flexdma.tools.budget import Budget
from flexdma.tools.records import Results
from flexdma.tools.timing import LostDeviceError, Turns, in_one_line

# Seconds beyond a limit after which a process is killed: contenders that end in time keep the limits by themselves.
GRACE = 5.0
LONGEST_WAIT = 1e6  # poll takes milliseconds in 32 bits
Progress = Callable[[str, str, int, int], None]  # case, contender, how many cases are done, of how many


class Ended(NamedTuple):
    """How the process of a case has ended: with all rows, or why not and at which contender ("": none)."""

    rows: list[Row] | None = None
    why: str = ""
    contender: str = ""


def measure_all(
    cases: Iterable[Planned],
    results: Results,
    setting: Setting,
    turns: Turns,
    *,
    save: Callable[[Results], None] = lambda results: None,
    progress: Progress = lambda case, contender, done, of: None,
) -> None:
    """Add the records of the cases to `results`; `save` is called after every case."""
    cases = list(cases)
    for done, case in enumerate(cases):
        rows: list[Row] = [("", "skipped", turns.budget.reason())]
        if not turns.budget.over:
            tick = partial(_tick, progress, case, done, len(cases))
            rows = measure_apart(case, setting, replace(turns, tick=tick))
        results.add(case.section, case.title, rows)
        save(results)


def _tick(progress: Progress, case: Planned, done: int, of: int, contender: str) -> None:
    progress(str(case), contender, done, of)


def measure_apart(case: Planned, setting: Setting, turns: Turns) -> list[Row]:
    """The rows of a case, measured in another process, or in several where contenders bring it down."""
    without: dict[str, str] = {}
    while True:
        turns.tick("")
        ended = _in_a_process(case, setting, replace(turns, without=without))
        if ended.rows is not None:
            return ended.rows
        if not ended.contender or ended.contender in without or turns.budget.over:
            return [(name, "failed", why) for name, why in (without | {ended.contender: ended.why}).items()]
        without[ended.contender] = ended.why


def _in_a_process(case: Planned, setting: Setting, turns: Turns) -> Ended:
    context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        # Imported once, neither of which touches CUDA: a process is forked in milliseconds and compiles seconds earlier.
        context.set_forkserver_preload([__name__, "torch._inductor.compile_fx"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, case, setting, turns.rounds, turns.budget, turns.without))
    process.start()
    theirs.close()
    try:
        ended = follow(ours, turns.budget, turns.tick)
        if ended.rows is not None or not ended.why:  # it ends by itself
            process.join(GRACE)
        if ended.rows is None and not ended.why:
            ended = ended._replace(why=f"its process ended, {_ending(process.exitcode)}")
    finally:
        _kill(process)
    return ended


def follow(connection: Connection, budget: Budget, tick: Callable[[str], None]) -> Ended:
    """Hear of a process until it ends (without a reason, where it only closes) or a contender has taken its share of time."""
    contender, spent = "", defaultdict[str, float](float)
    while True:
        start = budget.now()
        limit = max(0, min(budget.left, budget.share - spent[contender])) + GRACE
        if not connection.poll(min(limit, LONGEST_WAIT)):
            return Ended(None, budget.reason(), contender)
        try:
            kind, news = connection.recv()
        except EOFError:
            return Ended(None, "", contender)
        spent[contender] += budget.now() - start
        if kind == "rows":
            return Ended(news)
        if kind == "failed":
            return Ended([("", "failed", news)])
        if kind == "lost":
            return Ended(None, f"{news}; the GPU took no more calls", contender)
        contender = news
        tick(contender)


def _measure(
    connection: Connection, case: Planned, setting: Setting, rounds: int, budget: Budget, without: Mapping[str, str]
) -> None:
    """In the other process: `case.measure`, with news of each contender."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C reaches the parent alone, which ends this process, compilers that it started included
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    try:
        turns = Turns(rounds, lambda name: connection.send(("contender", name)), budget, without)
        connection.send(("rows", list(case.measure(setting, turns))))
    except LostDeviceError as error:
        connection.send(("lost", error.args[1]))
    except Exception as error:  # whatever a kernel or a compiler may raise
        connection.send(("failed", in_one_line(error)))


def _end_with_parent(connection: Connection) -> None:
    """Nothing is ever sent to this process: the connection ends when its parent does."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL) if hasattr(os, "killpg") else os._exit(1)


def _kill(process: Any) -> None:
    """With all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):
        process.kill()  # it has no group yet, or there are none here
    process.join()


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
