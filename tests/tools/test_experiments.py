"""The experiments: tasks that their own symbols answer, runs that go on after an interruption, and the report."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexdma import annealed_window
from flexdma.__main__ import main
from flexdma.tools.experiments import grid, training
from flexdma.tools.experiments.mixers import MIXERS, ModelSizes
from flexdma.tools.experiments.presets import PRESETS, Setting
from flexdma.tools.experiments.tasks import IGNORED, Copying, Recall
from flexdma.tools.experiments.training import Schedule

ROOT = Path(__file__).parents[2]
TINY = Recall(length=24, pairs=3, questions=4, keys=5, values=5, noise=5)


def _answers(task, symbols):
    """Position -> (answer, distance), read from one sequence [N, S] from left to right."""
    written: dict[int, tuple[int, int]] = {}
    found = {}
    asked = task.symbols - 1
    rows = symbols.tolist()
    for position, row in enumerate(rows):
        key = row[0]
        if key >= task.keys:
            continue
        if task.form == "stacked":
            value = row[1] if row[1] != asked else None
        else:
            value = rows[position + 1][0] if task.keys <= rows[position + 1][0] < task.keys + task.values else None
        if value is None:
            found[position] = (written[key][0], position - written[key][1])
        else:
            written[key] = (value, position)
    return found


@pytest.mark.parametrize(
    "task",
    [
        TINY,
        Recall(length=40, pairs=3, questions=4, keys=5, form="unstacked"),
        Recall(length=24, pairs=4, questions=6, overwritten=3, lead=0),
    ],
)
def test_the_last_pair_of_a_key_answers_each_question(task):
    batch = task.batch(20, torch.Generator().manual_seed(0))
    assert batch.symbols.max() < task.symbols
    _, noise = task.pairs_and_noise(batch.symbols)
    assert noise[:, : task.lead].all()
    for symbols, targets, distance in zip(*batch, strict=True):
        asked = {
            position: (targets[position].item(), distance[position].item())
            for position in (targets != IGNORED).nonzero().flatten().tolist()
        }
        assert asked == _answers(task, symbols)
        assert len(asked) == task.questions


def test_copying_asks_for_the_tokens_in_order():
    task = Copying(length=20, tokens=3, content=4, noise=5)
    symbols, targets, distance = task.batch(10, torch.Generator().manual_seed(0))
    for row, target, back in zip(
        symbols[..., 0].tolist(), targets[:, -3:].tolist(), distance[:, -3:].tolist(), strict=True
    ):
        at = [position for position, symbol in enumerate(row) if symbol < 4]
        assert [row[position] for position in at] == target
        assert [17 + n - position for n, position in enumerate(at)] == back


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="length: expected at least 32"):
        Recall(length=20, pairs=8, questions=20)
    with pytest.raises(ValueError, match="lead: expected a multiple of the 2 positions"):
        Recall(form="unstacked", lead=3)
    with pytest.raises(ValueError, match="pairs: expected at least overwritten"):
        Recall(pairs=2, overwritten=3)
    with pytest.raises(ValueError, match="tokens: expected at most"):
        Copying(length=10, tokens=6)


def _setting(**changes):
    given = {"mixers": ("full", "DMA"), "rates": (1e-3,), "seeds": (0, 1)} | changes
    return Setting(TINY, ModelSizes(width=8, window=4), Schedule(steps=2, batch=2, every=1, held_out=4), **given)


def test_an_interrupted_experiment_goes_on_and_refuses_other_sizes(tmp_path):
    def interrupt(run, outcome):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grid.run_all(_setting(), tmp_path, device="cpu", workers=1, watch=interrupt)
    assert len(grid.finished(_setting(), tmp_path)) == 1
    trained = []
    outcomes = grid.run_all(
        _setting(), tmp_path, device="cpu", workers=1, watch=lambda run, outcome: trained.append(run)
    )
    assert len(trained) == 3
    assert list(outcomes) == grid.runs_of(_setting())
    whole = grid.run_all(_setting(), tmp_path / "whole", device="cpu", workers=1, watch=lambda run, outcome: None)
    assert [o.loss for o in outcomes.values()] == [o.loss for o in whole.values()]
    with pytest.raises(grid.RefusedError, match="--out: expected a new folder"):
        grid.finished(Setting(TINY, ModelSizes(width=16), Schedule(steps=2)), tmp_path)


class _Windows:
    """A probe that looks at the window of the first layer."""

    def measure(self, model, task, *, is_last):
        return {"window": model.mixers[0].window_size}


@pytest.mark.parametrize("mixer", ["DMA", "window"])
def test_windows_that_shrink_are_those_of_gates_and_end_before_an_evaluation(mixer, monkeypatch):
    seen = []

    def recorded(*given):
        seen.append(given)
        return annealed_window(*given)

    monkeypatch.setattr(training, "annealed_window", recorded)
    schedule = Schedule(steps=4, batch=2, every=1, held_out=4, anneal=0.5)
    outcome = training.train(mixer, TINY, ModelSizes(width=8, window=4), schedule, rate=1e-3, seed=0, probe=_Windows())
    assert [probed["window"] for probed in outcome.probed] == [4] * 4
    assert seen == ([(4, 24, step / 4, 0.5) for step in range(4)] if mixer == "DMA" else [])


def test_the_command_writes_runs_table_and_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS["cpu"], "stacked", _setting())
    assert main(["experiments", "stacked", "--out", str(tmp_path), "--seeds", "0", "--workers", "1"]) == 0
    assert "far" in capsys.readouterr().out
    written = json.loads((tmp_path / "stacked-cpu.json").read_text())
    assert [run["mixer"] for run in written["runs"]] == ["full", "DMA"]
    assert written["runs"][0]["steps"] == [1, 2]
    assert (tmp_path / "stacked-cpu.png").stat().st_size > 1000
    assert (tmp_path / "stacked-cpu.md").read_text().count("\n") == 4
    assert main(["experiments", "stacked", "--mixers", "nothing"]) == 2


def test_a_mixer_of_a_missing_package_is_left_out_with_a_line_and_refused_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(MIXERS, "Doge", MIXERS["Doge"]._replace(package="no_such_package"))
    monkeypatch.setitem(PRESETS["cpu"], "stacked", _setting(mixers=("full", "Doge"), seeds=(0,)))
    needs = "Doge needs no_such_package: pip install flexdma[mixers]"
    arguments = ["experiments", "stacked", "--out", str(tmp_path), "--workers", "1"]
    assert main(arguments) == 0
    assert f"left out: {needs}\n" in capsys.readouterr().out
    written = json.loads((tmp_path / "stacked-cpu.json").read_text())
    assert [run["mixer"] for run in written["runs"]] == ["full"]
    assert main([*arguments, "--mixers", "Doge"]) == 2
    assert f"--mixers: {needs}" in capsys.readouterr().err


KILLED = """
import multiprocessing, os, signal, time
from flexdma.tools.experiments import grid

def work(started):
    grid.start_worker()
    started.set()
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    worker = context.Process(target=work, args=(started,))
    worker.start()
    started.wait()
    print(worker.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_worker_ends_with_a_killed_parent(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    # Not an assertion about time: the pipe ends when both processes have, and the worker sleeps for ten minutes.
    killed = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, timeout=300, cwd=ROOT)
    assert int(killed.stdout) > 0
    assert killed.returncode == -signal.SIGKILL
