"""Compilation ahead of a measurement: every case runs once, beside others, and nothing runs on."""

import os
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from flexdma.tools.bench.ahead import compile_ahead
from flexdma.tools.bench.sections import Planned, Setting
from flexdma.tools.budget import Budget
from tests.tools.test_bench_limits import is_running

SETTING = Setting("cpu", torch.float32, threads=1)
WAIT = 0.05  # seconds between two looks


# Cases run in other processes, so they are functions of this module.


def alone(folder, name, setting, turns):
    """Writes to a file whether another case of the folder was running, and the rounds."""
    busy = folder / "busy"
    crowded = busy.exists()
    busy.touch()
    turns.tick(name)
    (folder / name).write_text(f"{crowded} {turns.rounds}")
    busy.unlink()
    yield name, "seconds", 1.0


def crashing(setting, turns):
    os.abort()


def meeting(folder, name, other, setting, turns):
    """Ends only beside the other one."""
    (folder / name).touch()
    while not (folder / other).exists():
        time.sleep(WAIT)
    yield name, "seconds", 1.0


def endless(folder, setting, turns):
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(1e6)


def planned(name, measure):
    return Planned("calls", name, measure)


def test_every_case_runs_once_also_after_one_that_crashes(tmp_path):
    seen = []
    cases = [planned("crash", crashing), *(planned(name, partial(alone, tmp_path, name)) for name in "ab")]
    compile_ahead(cases, SETTING, Budget(), 1, lambda *news: seen.append(news))
    assert {name: (tmp_path / name).read_text() for name in "ab"} == {"a": "False 1", "b": "False 1"}
    assert seen == [("calls: crash", 1, 3), ("calls: a", 2, 3), ("calls: b", 3, 3)]


def test_cases_run_beside_each_other(tmp_path):
    cases = [planned(a, partial(meeting, tmp_path, a, b)) for a, b in ("ab", "ba")]
    compile_ahead(cases, SETTING, Budget(), 2)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_nothing_begins_after_the_budget(tmp_path):
    compile_ahead([planned("a", partial(alone, tmp_path, "a"))], SETTING, Budget(0.0), 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_an_interruption_ends_what_runs(tmp_path):
    def interrupt(*news):
        while not (tmp_path / "pid").exists():
            time.sleep(WAIT)
        raise KeyboardInterrupt

    cases = [planned("endless", partial(endless, tmp_path)), planned("a", partial(alone, tmp_path, "a"))]
    with pytest.raises(KeyboardInterrupt):
        compile_ahead(cases, SETTING, Budget(), 2, interrupt)
    assert not is_running(int(Path(tmp_path / "pid").read_text()))
