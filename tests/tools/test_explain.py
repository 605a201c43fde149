"""explain: its counts equal those of the dense mask, its predictions equal its formulas, its advice fits the gates."""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flexdma
from flexdma.__main__ import main
from flexdma.lifespans import Selection
from flexdma.packing.rows import FoldedRows
from flexdma.reference import dense_visibility
from flexdma.tools.cost_model import measured
from flexdma.tools.cost_model.counts import causal_blocks
from flexdma.tools.cost_model.measured import Problem, Rates
from flexdma.tools.explain import calibration
from flexdma.tools.explain.break_even import break_even_length, break_even_window, speedup
from flexdma.tools.gate_families import gate_families
from flexdma.tools.records import Results
from flexdma.tools.shapes import Shape, inputs
from flexdma.tools.whole_calls import CAUSAL, COMPILED, EAGER


def dense_blocks(visible, group, rows, columns):
    """Visited and full blocks [H] of [B, H, K, K], means over the batch, counted one by one."""
    folded = visible.repeat_interleave(group, 2)
    visited, full = torch.zeros(2, *visible.shape[:2])
    for top in folded.split(rows, 2):
        for block in top.split(columns, 3):
            visited += block.flatten(2).any(-1)
            # The kernel's blocks have `columns` keys, so a block cut off by the end of K is not full.
            full += block.flatten(2).all(-1) & (block.shape[3] == columns)
    return visited.mean(0).tolist(), full.mean(0).tolist()


CASES = {
    "plain": {},
    "sinks and recent": {"sinks": 2, "recent": 3},
    "documents": {"document_ids": torch.arange(90)[None].expand(2, -1) // 40},
    "padding": {"key_padding_mask": torch.arange(90)[None] >= torch.tensor([[0], [25]])},
    "global": {"selection": "global"},
    "threshold": {"selection": "threshold"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_counts_are_those_of_the_dense_mask(options):
    gate = torch.randn(2, 3, 90)
    report = flexdma.explain(gate, 12, num_query_heads=6, block_size=(16, 8), **options)
    visible = dense_visibility(gate, window_size=12, **options)
    for head, keys in enumerate(report.keys_per_head):
        lived = visible[:, head].sum(1)
        seen = lived[lived > 0].tolist()
        assert keys.ever_visible == len(seen) / 2
        assert keys.share == pytest.approx(len(seen) / 180)
        assert keys.mean_lifespan == pytest.approx(statistics.mean(seen))
        assert keys.median_lifespan == statistics.median_low(seen)
        assert keys.visible_per_query == pytest.approx(visible[:, head].sum().item() / 180)
    visited, full = dense_blocks(visible, 2, 16, 8)
    assert report.natural.visited == pytest.approx(statistics.mean(visited))
    assert report.natural.full == pytest.approx(statistics.mean(full))
    names = {"selection": "kind", "sinks": "sinks", "recent": "recent"}
    policy: dict[str, Any] = {"kind": "causal", "sinks": 0, "recent": 0}
    policy |= {names[n]: options[n] for n in names if n in options}
    masks = {name: option for name, option in options.items() if name not in names}
    alive = Selection.of(window_size=12, heads=gate.shape[1], **policy).lifespans(gate, **masks)
    length, capacity = gate.shape[-1], 12 + options.get("sinks", 0) + options.get("recent", 0)
    layout = flexdma.packed_layout(length, length, capacity, block_size=(16, 8), group=2)
    packing, query = flexdma.pack(alive, layout, queries=length), torch.arange(length)[:, None]
    at_places = (packing.birth[:, :, None] <= query) & (query < packing.death[:, :, None])
    visited, full = dense_blocks(at_places, 2, 16, 8)
    assert [blocks.visited for blocks in report.packed_per_head] == pytest.approx(visited)
    assert [blocks.full for blocks in report.packed_per_head] == pytest.approx(full)
    pairs = visible.sum().item() / 6 * 2
    assert report.packed.over_causal == pytest.approx(report.packed.visited / report.causal_blocks)
    assert statistics.mean(b.visited / b.over_ideal for b in report.packed_per_head) == pytest.approx(pairs / 128)


@pytest.mark.parametrize(("length", "group", "block"), [(90, 2, (16, 8)), (64, 1, (16, 16)), (33, 3, (8, 5))])
def test_causal_blocks_are_counted_exactly(length, group, block):
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    assert causal_blocks(FoldedRows(length, group, by_head=False), block) == dense_blocks(mask, group, *block)[0][0]


def test_heads_are_listed_where_they_differ():
    families = gate_families(2048)
    alike = flexdma.explain(torch.stack([families["iid"], families["iid"]])[None], 64)
    differing = flexdma.explain(torch.stack([families["iid"], families["rising"]])[None], 64)
    assert "head   " not in str(alike)
    assert "head   " in str(differing)


# Advice


def advice(gate, window=64, **options):
    return " ".join(flexdma.explain(gate.view(1, 1, -1), window, **options).advice)


def test_constant_and_rising_gates_are_told_to_be_a_sliding_window():
    for gate in (torch.zeros(2048), torch.arange(2048.0)):
        assert "exactly a sliding window" in advice(gate)
        assert "natural order is already good" in advice(gate)
    assert "sliding window" not in advice(torch.randn(2048))


def test_a_static_selection_is_told():
    assert "static" in advice(-torch.arange(2048.0))
    assert "static" not in advice(torch.randn(2048))


def test_a_selection_that_never_fires_is_told():
    documents = torch.arange(2048)[None] // 50
    assert "never evicts a key" in advice(torch.randn(2048), document_ids=documents)
    assert "longest document has 50 tokens" in advice(torch.randn(2048), document_ids=documents)
    assert "never evicts a key" in advice(torch.randn(64))
    assert "never" not in advice(torch.randn(2048))


def test_unseen_keys_are_told_and_recency_ends_it():
    gate = torch.randn(2048)
    assert "outranked on arrival" in advice(gate)
    assert "outranked on arrival" not in advice(gate + 0.5 * torch.arange(2048))


def test_a_gate_that_shows_nothing_is_told():
    assert "no query sees any key" in advice(torch.full((256,), -torch.inf))


def test_a_short_context_is_told_what_would_pay():
    told = advice(torch.randn(300), 128, rates={("cpu", "inference"): RATES})
    assert "slower than full attention" in told
    assert "a context of at least" in told


# The cost model: its arithmetic and its shape, no timing

RATES = Rates("a test", causal=1.0, gather=2.0, gather_selection=10.0, flex=3.0, flex_selection=20.0)
PROBLEM = Problem(length=4096, window=256, always=0, group=4, rho=1.4)
SHOWN = 256 * 257 / 2 + (4096 - 256) * 256  # the first 256 queries see 1, 2, 3, ... keys


def test_the_model_is_its_formula():
    causal = 4 * 4096 * 4097 / 2
    assert speedup(RATES, "gather", PROBLEM) == pytest.approx(causal / (4 * 4096 * (256 + 128) * 2 + 4096 * 12 * 10))
    assert speedup(RATES, "flex", PROBLEM) == pytest.approx(causal / (4 * 1.4 * SHOWN * 3 + 4096 * 12 * 20))


@pytest.mark.parametrize("lowering", ["gather", "flex"])
def test_longer_contexts_and_smaller_windows_pay_more(lowering):
    by_length = [speedup(RATES, lowering, replace(PROBLEM, length=n)) for n in (64, 512, 4096, 4097, 65536)]
    by_window = [speedup(RATES, lowering, replace(PROBLEM, window=w)) for w in (1, 16, 255, 256, 1024, 4096)]
    assert by_length == sorted(by_length)
    assert by_window == sorted(by_window, reverse=True)
    denser = replace(PROBLEM, rho=1.2)
    assert speedup(RATES, "flex", denser) > speedup(RATES, "flex", PROBLEM)


@pytest.mark.parametrize("lowering", ["gather", "flex"])
def test_break_even_is_where_the_speed_up_crosses_one(lowering):
    length = break_even_length(RATES, lowering, PROBLEM)
    window = break_even_window(RATES, lowering, PROBLEM)
    assert length is not None
    assert window is not None
    assert speedup(RATES, lowering, replace(PROBLEM, length=length)) >= 1
    assert speedup(RATES, lowering, replace(PROBLEM, length=length - 1)) < 1
    assert speedup(RATES, lowering, replace(PROBLEM, window=window)) >= 1
    assert speedup(RATES, lowering, replace(PROBLEM, window=window + 1)) < 1


def test_where_nothing_pays_the_break_even_is_none():
    assert break_even_window(replace(RATES, gather_selection=1e9), "gather", PROBLEM) is None
    assert break_even_length(replace(RATES, causal=1e-9), "gather", PROBLEM) is None


def test_the_rates_that_ship_say_where_they_are_from():
    assert ("cpu", "inference") in measured.RATES
    for rates in measured.RATES.values():
        assert "torch" in rates.measured_on
        # A pair costs a lowering at least as much as SDPA, unless the measurement is wrong.
        assert rates.gather is not None
        assert rates.gather >= rates.causal > 0


def test_the_rates_that_ship_reproduce_the_benchmark_of_the_docs():
    results = Results.from_json((Path(__file__).parents[2] / "docs/results/bench-cpu.json").read_text())
    compared = 0
    for case in results.cases("calls"):
        shape = case.shape
        gate = inputs(shape, "cpu", torch.float32)[3].detach()
        report = flexdma.explain(gate, shape.window, num_query_heads=shape.query_heads)
        for prediction in report.predictions:
            name = {"gather": EAGER, "flex": COMPILED}[prediction.lowering]
            if (prediction.phase == "training") == shape.backward:
                took = case.seconds[CAUSAL] / case.seconds[name]
                assert prediction.speedup == pytest.approx(took, rel=0.15), (case.title, name)
                compared += 1
    assert compared == 6


def test_calibration_finds_the_rates_that_explain_its_seconds():
    shape = Shape(4096, 256, False, 8, 2, 64)
    causal, gather, flex = (
        cost(RATES, PROBLEM) * shape.heads / 1e9
        for cost in (measured.causal_cost, measured.gather_cost, measured.flex_cost)
    )
    sorting = measured.sorted_keys(PROBLEM.length) * shape.heads / 1e9
    stages = {
        "gather": {
            "gate": 1.0, "ranking": sorting, "lifespans": sorting * 4, "reference gates": sorting,
            "living keys": sorting * 4,
        },
        "flex": {
            "ranking": sorting, "lifespans": sorting * 4, "reference gates": sorting, "packing": sorting * 5,
            "mask metadata": sorting * 9,
        },
    }  # fmt: skip
    selection = calibration.selection_rates(stages, shape)
    seconds = {
        "SDPA causal, flash": causal,
        "SDPA causal, cudnn": 2 * causal,
        EAGER: gather,
        COMPILED: flex,
    }
    found = calibration.rates_from(shape, seconds, selection, 1.4 * SHOWN / 4096, "a test")
    for name in ("causal", "gather", "gather_selection", "flex", "flex_selection"):
        assert getattr(found, name) == pytest.approx(getattr(RATES, name))
    without = calibration.rates_from(shape, {CAUSAL: causal}, selection, 350.0, "a test")
    assert (without.gather, without.flex) == (None, None)


def test_the_fit_is_the_geometric_mean_over_the_shapes_of_a_phase():
    shapes = [Shape(4096, 256, False), Shape(2048, 128, True)]
    about = {"device": "cpu", "dtype": "float32", "machine": {"device": "d", "threads": 2, "torch": "t"}}
    results = Results(about, {str(shape): shape for shape in shapes})
    stages = ("ranking", "lifespans", "reference gates", "living keys")
    results.add("stages of gather", str(shapes[0]), ((stage, "seconds", 0.001) for stage in stages))
    for shape in shapes:
        results.add("calls", str(shape), [(CAUSAL, "seconds", 1.0), (EAGER, "seconds", 0.5)])
    fitted = calibration.fitted_rates(results)
    assert set(fitted) == {("cpu", "inference"), ("cpu", "training")}
    for rates, shape in zip(fitted.values(), shapes, strict=True):
        problem = Problem(shape.length, shape.window, 0, 4, rho=1.0)  # the gather lowering does not depend on rho
        assert speedup(rates, "gather", problem) == pytest.approx(2.0)
        assert rates.flex is None
    two = calibration.geometric_mean([RATES, replace(RATES, causal=4.0, flex=None)])
    assert two.causal == pytest.approx(2.0)
    assert two.flex == pytest.approx(RATES.flex)


def test_calibration_counts_the_blocks_that_explain_counts():
    shape = Shape(512, 32, False, 4, 2, 8)
    gate = torch.randn(1, 2, 512)
    report = flexdma.explain(gate, 32, num_query_heads=4)
    rows, columns = report.block_size
    expected = report.packed.visited * rows * columns / (512 * 2)
    assert calibration.visited_pairs_per_query(shape, gate, "cpu") == pytest.approx(expected)


def test_a_device_without_rates_gets_counts_and_no_prediction():
    report = flexdma.explain(torch.randn(1, 1, 512), 32, rates={})
    assert report.predictions == []
    assert "no prediction: no rates were measured on cpu" in str(report)


# Report and command


def test_the_report_prints_and_is_json():
    report = flexdma.explain(torch.randn(1, 2, 1024), 64, num_query_heads=4)
    assert "keys ever visible" in str(report)
    assert "a model" in str(report)
    data = json.loads(report.to_json())
    assert data["keys"]["share"] == report.keys.share
    assert data["predictions"][0]["lowering"] == "gather"


def test_the_command_explains_a_family_and_a_file(capsys, tmp_path):
    assert main(["explain", "--length", "512", "--window", "32", "--gates", "heavy-hitters"]) == 0
    assert "N = 512, w = 32, 8 query heads on 2 gate heads" in capsys.readouterr().out
    torch.save(torch.randn(1, 4, 128), tmp_path / "gate.pt")
    assert main(["explain", "--gates", str(tmp_path / "gate.pt"), "--window", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["length"] == 128


def test_the_command_predicts_with_rates_measured_here(capsys, monkeypatch):
    monkeypatch.setattr(calibration, "measured_rates", lambda device: {(device, "inference"): RATES})
    assert main(["explain", "--length", "512", "--window", "32", "--document", "100", "--calibrate"]) == 0
    assert "rates from a test" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gates", "nothing"], "--gates: expected a file or one of iid"),
        (["--window", "0", "--length", "64"], "--window: expected at least 1, got 0"),
        (["--length", "0"], "--length: expected at least 1, got 0"),
        (["--query-heads", "3", "--length", "64"], "num_query_heads: expected a multiple of gate's 2 heads, got 3"),
        (["--document", "-1", "--length", "64"], "--document: expected at least 0, got -1"),
        (["--fit", "no-such-file"], "--fit: expected a file that can be read, got no-such-file"),
        (["--fit", __file__], "--fit: expected JSON that this version of the benchmark wrote"),
        (["--gates", __file__], "--gates: expected a tensor that torch.save wrote"),
    ],
)
def test_bad_requests_are_one_line(capsys, arguments, message):
    assert main(["explain", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_bad_arguments_name_themselves():
    with pytest.raises(ValueError, match="gate: expected \\[B, Hkv, K\\]"):
        flexdma.explain(torch.randn(4), 2)
    with pytest.raises(ValueError, match="selection: expected one of"):
        flexdma.explain(torch.randn(1, 1, 4), 2, selection="best")
    with pytest.raises(TypeError, match="window_size"):
        flexdma.explain(torch.randn(1, 1, 4), None)


def test_a_threshold_alone_has_no_window():
    report = flexdma.explain(torch.randn(1, 1, 400), None, selection="threshold")
    assert report.window_size == []
    assert "w = none" in str(report)
