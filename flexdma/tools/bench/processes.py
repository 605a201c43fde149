"""Run each case of a suite in its own process, with a time limit.

After a failed kernel every later call of the process fails on that GPU, a compiler or a driver may crash, and Python cannot
interrupt a kernel that never returns.  In these cases only the running contender is lost: it is recorded with the reason,
and its case starts again without it.  All processes end with this one.
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

# Seconds after a limit at which a process is killed.  Contenders whose runs end stop at the limit themselves.
GRACE = 5.0
LONGEST_WAIT = 1e6  # poll counts milliseconds in 32 bits
Progress = Callable[[str, str, int, int], None]  # case, contender, number of finished cases, number of cases


class Ended(NamedTuple):
    """The end of a case's process: all its rows, or the reason and the running contender ("" = none)."""

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
    """Measure the cases, add their records to `results`, and call `save` after every case."""
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
    """The rows of a case, measured in another process; again in a new one without a contender that ended it."""
    without: dict[str, str] = {}
    while True:
        turns.tick("")
        ended = _in_a_process(case, setting, replace(turns, without=without))
        if ended.rows is not None:
            return ended.rows
        if not ended.contender or ended.contender in without or turns.budget.over:
            return [(name, "failed", why) for name, why in (without | {ended.contender: ended.why}).items()]
        without[ended.contender] = ended.why


def started(case: Planned, setting: Setting, turns: Turns) -> tuple[Any, Connection]:
    """A process that measures the case, and the end of its connection that receives its messages."""
    context: Any = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        # Import these once, so that a process forks in milliseconds and compiles seconds earlier.  A process that has
        # initialised CUDA cannot fork, and importing Inductor does so (torch 2.11).
        context.set_forkserver_preload(
            ["torch"] if setting.device == "cuda" else [__name__, "torch._inductor.compile_fx"]
        )
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, case, setting, turns.rounds, turns.budget, turns.without))
    process.start()
    theirs.close()
    return process, ours


def _in_a_process(case: Planned, setting: Setting, turns: Turns) -> Ended:
    process, ours = started(case, setting, turns)
    try:
        ended = follow(ours, turns.budget, turns.tick)
        if ended.rows is not None or not ended.why:  # the process ends by itself
            process.join(GRACE)
        if ended.rows is None and not ended.why:
            ended = ended._replace(why=f"its process ended, {_ending(process.exitcode)}")
    finally:
        killed(process)
    return ended


def follow(connection: Connection, budget: Budget, tick: Callable[[str], None]) -> Ended:
    """Receive messages of a process until it ends or its contender exceeds a time limit.

    The reason is "" where the connection only closes.
    """
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
            return Ended(None, f"{news}; the GPU accepted no more calls", contender)
        contender = news
        tick(contender)


def _measure(
    connection: Connection, case: Planned, setting: Setting, rounds: int, budget: Budget, without: Mapping[str, str]
) -> None:
    """In the other process: run `case.measure`, and send a message for each contender."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C then reaches only the parent, which ends this process and the compilers that it started
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    if setting.threads is not None:
        torch.set_num_threads(setting.threads)
    try:
        turns = Turns(rounds, lambda name: connection.send(("contender", name)), budget, without)
        connection.send(("rows", list(case.measure(setting, turns))))
    except LostDeviceError as error:
        connection.send(("lost", error.args[1]))
    except Exception as error:  # kernels and compilers may raise anything
        connection.send(("failed", in_one_line(error)))


def _end_with_parent(connection: Connection) -> None:
    """End this process with its parent.  The parent sends nothing, so `recv` returns only when the connection closes."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL) if hasattr(os, "killpg") else os._exit(1)


def killed(process: Any) -> None:
    """Kill a process and all processes that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):
        process.kill()  # it has no process group yet, or the system has none
    process.join()


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
