"""What is made of experiments: best rates, the paper's claims, and a page that says what the JSON says."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from flexdma.__main__ import CANNOT, main
from flexdma.tools.experiments.experiment import BITS, Experiment
from flexdma.tools.experiments.mixers import ModelSizes
from flexdma.tools.experiments.presets import PRESETS, Setting
from flexdma.tools.experiments.probes import GateCourse, HeatMap
from flexdma.tools.experiments.reports.claims import CLAIMS, OWN, UNMEASURED, claims_table, compared
from flexdma.tools.experiments.reports.page import page, read_experiments
from flexdma.tools.experiments.tasks import Language, Needles, Recall
from flexdma.tools.experiments.training import Outcome, Schedule

DOCS = Path(__file__).parents[2] / "docs"
PERPLEXITY, RECALL, NEEDLES, BENCHMARKS = CLAIMS
MACHINE = {"device": "a processor", "threads": 1, "torch": "2.13.0", "python": "3.11.2", "flexdma": "0.1.0"}


def _experiment(task, scores):
    """scores: (mixer, rate) -> a score per seed, bits per byte in lm and the accuracy of far questions elsewhere."""
    outcomes = []
    for (mixer, rate), seeds in scores.items():
        for seed, score in enumerate(seeds):
            loss, far = (score / BITS, float("nan")) if task.startswith("lm") else (1.0, score)
            outcomes.append(Outcome(mixer, rate, seed, 100, [10], [0.5], [far], [loss], [], 1.5))
    setting = {
        "task": {"length": 64, "text": "python"}, "sizes": {"layers": 1, "window": 8, "width": 16},
        "schedule": {"steps": 10, "batch": 2},
    }  # fmt: skip
    return Experiment(task, "cpu", setting, MACHINE, outcomes)


def test_the_best_rate_has_the_lowest_loss_of_text_and_the_highest_accuracy_elsewhere():
    scores = {("DMA", 0.001): [0.2, 0.4], ("DMA", 0.01): [0.5, 0.3]}
    assert _experiment("stacked", scores).row("DMA").rate == 0.01
    assert _experiment("lm-python-64", scores).row("DMA").rate == 0.001
    assert _experiment("stacked", scores).row("full") is None


def test_claims_agree_where_differences_exceed_the_spreads():
    better = _experiment("lm-python-64", {("DMA", 0.1): [2.0, 2.0], ("full", 0.1): [2.1, 2.1]})
    worse = _experiment("lm-python-32", {("DMA", 0.1): [2.2, 2.2], ("full", 0.1): [2.1, 2.1]})
    near = _experiment("lm-networkx-32", {("DMA", 0.1): [1.9, 2.1], ("full", 0.1): [2.05, 2.05]})
    assert compared([better], PERPLEXITY, "DMA", "full") == (
        "**agrees**: better in 1, worse in 0 of 1; mean 2.000 against 2.100"
    )
    assert compared([worse], PERPLEXITY, "DMA", "full").startswith("**disagrees**: better in 0, worse in 1 of 1")
    assert compared([better, worse], PERPLEXITY, "DMA", "full").startswith("**mixed**: better in 1, worse in 1 of 2")
    assert compared([near], PERPLEXITY, "DMA", "full").startswith("**no difference**: better in 0, worse in 0 of 1")
    assert compared([better], PERPLEXITY, "DMA", "MLA") == UNMEASURED
    assert compared([better], RECALL, "DMA", "full") == UNMEASURED
    stacked = _experiment("stacked", {("DMA", 0.1): [0.3, 0.3], ("full", 0.1): [1.0, 1.0]})
    assert compared([stacked], RECALL, "DMA", "full").startswith("**disagrees**")


def test_what_nothing_measured_is_said_plainly():
    table = claims_table([_experiment("stacked", {("DMA", 0.1): [0.3], ("full", 0.1): [1.0]})])
    rows = {tuple(re.findall(r"(?<=\| )[^|]+(?= \|)", line))[:2]: line for line in table.splitlines()[2:]}
    assert len(rows) == 10
    assert sum("agrees" in line for line in rows.values()) == 1
    assert all(line.count(UNMEASURED) == len(OWN) for line in rows.values() if "agrees" not in line)
    assert rows[BENCHMARKS.says, "multi-head attention (`full`)"].count(UNMEASURED) == len(OWN)


def test_an_experiment_is_written_and_read(tmp_path):
    experiment = _experiment("stacked", {("DMA", 0.1): [0.3, 0.25], ("full", 0.1): [1.0, 0.95]})
    path = tmp_path / "experiments-stacked-cpu.json"
    experiment.write(path)
    (found,) = read_experiments(tmp_path)
    assert [outcome.as_dict()["far"] for outcome in found.outcomes] == [[0.3], [0.25], [1.0], [0.95]]
    written = path.read_text()
    found.write(path)
    assert path.read_text() == written
    (tmp_path / "experiments-other.json").write_text('{"runs": [{}]}')
    with pytest.raises(ValueError, match="expected the JSON of an experiment"):
        read_experiments(tmp_path)


def _refuse(word):
    raise ValueError(f"expected JSON, which has no {word}")


def test_what_is_no_number_is_json_and_comes_back(tmp_path):
    experiment = _experiment("stacked", {("DMA", 0.1): [math.nan]})
    experiment.outcomes[0].probed.append({"A": [[math.inf, -math.inf, 1.0]]})
    path = tmp_path / "experiments-stacked-cpu.json"
    experiment.write(path)
    json.loads(path.read_text(), parse_constant=_refuse)
    (found,) = read_experiments(tmp_path)
    assert math.isnan(found.outcomes[0].far[0])
    assert found.outcomes[0].probed == experiment.outcomes[0].probed


@pytest.mark.parametrize("path", sorted((DOCS / "results").glob("*.json")), ids=lambda path: path.stem)
def test_committed_records_are_json(path):
    json.loads(path.read_text(), parse_constant=_refuse)


def test_the_page_of_results_is_what_its_json_says():
    written = (DOCS / "results.md").read_text()
    assert written == page(read_experiments(DOCS / "results")), "python -m flexdma experiments results"
    for link in re.findall(r"\]\((results/[^)]+)\)", written):
        assert (DOCS / link).stat().st_size > 1000


def _tiny(task, **more):
    return Setting(
        task,
        ModelSizes(width=8, window=4),
        Schedule(steps=2, batch=2, every=1, held_out=4),
        rates=(1e-2,),
        seeds=(0, 1),
        **more,
    )


def test_tasks_are_trained_and_become_a_page(tmp_path, capsys, monkeypatch):
    text = tmp_path / "some text.txt"
    text.write_bytes(bytes(range(256)) * 10)
    recall = Recall(length=24, pairs=3, questions=4, keys=5, values=5, noise=5)
    tiny = {
        "gates": _tiny(recall, mixers=("exp + slope", "full"), probe=GateCourse(sequences=2, by_token=2)),
        "niah": _tiny(Needles(length=48, needles=4), mixers=("full", "DMA"), probe=HeatMap((48, 96), 4, 192)),
        "lm-python-8": _tiny(Language(length=16, text="python"), mixers=("full", "DMA")),
    }
    monkeypatch.setitem(PRESETS, "cpu", tiny)
    folder = tmp_path / "results"
    folder.mkdir()
    for task, name in {"lm": "lm-some_text-8-cpu", "gates": "gates-cpu", "niah": "niah-cpu"}.items():
        options = ["--workers", "1", "--out", str(tmp_path / "out")] + (["--text", str(text)] if task == "lm" else [])
        assert main(["experiments", task, *options]) == 0
        assert f"{name}.json" in capsys.readouterr().out.replace("\n", "")
        assert (tmp_path / "out" / f"{name}.md").read_text().count("\n") == 4
        shutil.copy(tmp_path / "out" / f"{name}.json", folder / f"experiments-{name}.json")
        if task == "lm":  # pictures take most of the time
            assert main(["experiments", "results", "--page", str(tmp_path / "results.md")]) == 0
            written = (tmp_path / "results.md").read_text()
            assert written == page(read_experiments(folder))
            links = re.findall(r"\]\((results/[^)]+)\)", written)
            assert len(links) == 2
            assert all((tmp_path / link).stat().st_size > 500 for link in links)
    for picture in ("niah-cpu-heat-maps", "gates-cpu-gates", "lm-cpu"):
        assert (tmp_path / "out" / f"{picture}.png").stat().st_size > 1000
    whole = page(read_experiments(folder))
    for part in ("## gates-cpu", "## niah-cpu", "## lm-cpu", "seeds 0, 1", "a query sees", "`lm-python-8`"):
        assert part in whole
    assert whole.count("agrees**") + whole.count("difference**") == 2  # DMA than full, on the text and on needles


def test_options_of_other_tasks_and_missing_folders_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text"
    text.write_bytes(b"short")
    for options, message in {
        ("niah", "--text", "text"): "--text: expected the task lm, got niah",
        ("lm", "--text", "text"): "--text: expected at least",
        ("results",): "--page: expected the JSON of experiments in docs/results, got no such folder",
    }.items():
        assert main(["experiments", *options]) == CANNOT
        assert message in capsys.readouterr().err
