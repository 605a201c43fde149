"""The benchmark, without a timing: medians, memory, failures, budgets, the contenders' results, a suite, pages."""

import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex

import flexdma
from flexdma.__main__ import CANNOT, INTERRUPTED, main
from flexdma.reference import dense_dynamic_mask_attention, dense_visibility
from flexdma.stages import observed
from flexdma.tools.bench import contenders as contenders_module
from flexdma.tools.bench import limits, masks, measure, report, timing
from flexdma.tools.bench.contenders import COMPILED, COMPILED_GATHER, DENSE, FLEX_CAUSAL, contenders, visited_over_ideal
from flexdma.tools.bench.dense_mask import check_fits, dense_mask_attention
from flexdma.tools.bench.gradients import WITHOUT
from flexdma.tools.bench.limits import Budget
from flexdma.tools.bench.shapes import Shape, inputs
from flexdma.tools.bench.stages import BEFORE_ATTENTION, Ledger, profile
from flexdma.tools.bench.suites import FORWARD, SUITES, TRAINING
from flexdma.tools.bench.timing import Prepared, UnavailableError, interleaved, peak_bytes
from flexdma.tools.gate_families import _autoregressive, gate_families
from tests.hand_moved_clock import HandMovedClock

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

RESULTS = Path(__file__).parent.parent / "docs/results/bench-cpu.json"


def silent(name):
    """A tick."""


# Timing


def test_contenders_take_turns_and_the_first_round_is_not_counted():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    measured = interleaved(calls, 2, silent, memory=False)
    assert order == ["a", "b"] * 3
    assert set(measured.seconds) == {"a", "b"}
    assert measured.rounds == {"a": 2, "b": 2}


def test_a_failing_contender_is_recorded_and_loses_no_other():
    runs = []

    def fails_later():
        runs.append(1)
        if len(runs) > 3:
            raise RuntimeError("out of memory\nand a thousand lines")

    def absent():
        raise UnavailableError("not installed")

    measured = interleaved({"late": fails_later, "absent": absent, "good": lambda: None}, 3, silent)
    assert measured.failed == {"late": "RuntimeError: out of memory", "absent": "not installed"}
    assert set(measured.seconds) == {"good"}


def test_a_spent_budget_ends_the_runs_and_keeps_those_made(monkeypatch):
    clock = HandMovedClock()
    monkeypatch.setattr(limits, "SHARE", 1)
    runs = {name: lambda: clock.take(1) for name in "ab"}  # the first two are not counted
    measured = interleaved(runs, 9, silent, Budget(6.5, clock=clock), memory=False)
    assert measured.rounds == {"a": 2, "b": 2}
    assert interleaved(runs, 9, silent, Budget(0)).failed == dict.fromkeys(
        runs, "skipped: the suite's 0 seconds are spent"
    )


def test_slow_contenders_run_fewer_times():
    clock = HandMovedClock()
    runs = {"slow": lambda: clock.take(5), "good": lambda: None}
    measured = interleaved(runs, 50, silent, Budget(math.inf, clock=clock), memory=False)
    assert measured.rounds == {"slow": timing.LEAST, "good": 50}


def test_only_the_run_of_a_prepared_contender_is_timed():
    clock = HandMovedClock()
    prepared = Prepared(lambda: clock.take(7), lambda made: clock.take(1))
    measured = interleaved({"a": prepared}, 1, silent, Budget(math.inf, clock=clock), memory=False)
    assert measured.seconds == {"a": 1.0}


def test_peak_memory_counts_what_is_freed_again():
    def function():
        torch.zeros(1 << 20)  # 4 MiB, freed at once
        return torch.zeros(1 << 18)

    assert 4 << 20 <= peak_bytes(function) < 6 << 20
    assert peak_bytes(Prepared(function, lambda made: torch.zeros(1 << 10))) < 1 << 20


# What is measured


def test_masks_and_metadata_are_far_from_a_dense_mask():
    shape = Shape(8192, 128, False)
    gate = inputs(shape, "cpu", torch.float32)[3]
    for build in masks.mask_memory(shape, gate).values():
        assert peak_bytes(build) < shape.length**2 / 4


def test_there_are_seven_families_and_packing_helps_in_each():
    assert len(gate_families(256)) == 7
    for natural, packed in masks.packing_ratios(4096, 256, 64, 64).values():
        assert 1 <= packed < natural


def test_the_autoregressive_family_is_its_recurrence():
    noise = torch.randn(50, dtype=torch.float64)
    want = [noise[0]]
    for step in noise[1:]:
        want.append(0.98 * want[-1] + step)
    torch.testing.assert_close(_autoregressive(noise, 0.98), torch.stack(want))


def test_the_dense_path_computes_dynamic_mask_attention():
    leaves = [torch.randn(2, heads, 50, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    leaves.append(torch.randn(2, 2, 50, dtype=torch.float64, requires_grad=True))  # no ties: topk breaks them anyhow
    got = dense_mask_attention(*leaves, 12)
    want = dense_dynamic_mask_attention(*leaves, window_size=12)
    torch.testing.assert_close(got, want)
    cotangent = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(want, leaves, cotangent), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_dense_mask_that_does_not_fit_is_not_tried():
    with pytest.raises(UnavailableError, match="dense masks need about"):
        check_fits(Shape(4096, 1024, False, query_heads=2**20), 4, "cpu")
    with pytest.raises(UnavailableError, match="above N=8192"):
        check_fits(Shape(16384, 1024, False), 4, "cpu")


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """FlexAttention takes CPU tensors that need gradients, as it does when not compiled for a CPU."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    return lambda function, mode=None: function


def test_every_contender_that_masks_by_gates_gives_the_same(uncompiled_flex):
    shape = Shape(200, 24, False, 4, 2, 16, every=True)
    tensors = inputs(shape, "cpu", torch.float32)
    calls = contenders(shape, tensors, uncompiled_flex)
    want = dense_dynamic_mask_attention(*tensors, window_size=24)
    same = [name for name in calls if name in visited_over_ideal(shape, tensors[3]) and "causal" not in name]
    assert len(same) == 4
    for name in same:
        torch.testing.assert_close(calls[name].args[0](), want, atol=1e-5, rtol=1e-4)


def test_visited_over_ideal_counts_pairs():
    shape = Shape(256, 256, False, 4, 2, 16)
    ratios = visited_over_ideal(shape, torch.zeros(1, 2, 256))
    assert ratios["SDPA causal"] == 1  # nothing is ever evicted
    assert ratios[DENSE] == pytest.approx(256 * 256 / (256 * 257 / 2))
    assert ratios[COMPILED_GATHER] == pytest.approx(256 * (256 + 128) / (256 * 257 / 2))


def test_living_pairs_are_the_keys_that_a_block_sees():
    gate = torch.randn(2, 2, 100)
    seen = dense_visibility(gate, window_size=12)
    blocks = [rows.any(2).sum().item() * 32 for rows in seen.split(32, 2)]
    assert contenders_module._living_pairs(flexdma.causal_top_w(gate, 12), 32) == sum(blocks)


# Stages


def test_a_ledger_counts_what_runs_inside_a_stage_once(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 10.0])
    monkeypatch.setattr("flexdma.tools.bench.stages.time.perf_counter", lambda: next(clock))
    ledger = Ledger(runs=[{}])
    with ledger.stage("outer"), ledger.stage("inner"):
        pass
    assert ledger.runs == [{"inner": 2.0, "outer": 8.0}]
    assert ledger.medians(1) == ledger.runs[0]


def test_stages_are_observed_while_asked_for():
    seen, gate = [], torch.randn(1, 1, 8)

    @contextlib.contextmanager
    def observer(name):
        seen.append(name)
        yield

    with observed(observer):
        with observed(contextlib.nullcontext):
            flexdma.causal_top_w(gate, 2)
        assert not seen
        flexdma.causal_top_w(gate, 2)
    flexdma.causal_top_w(gate, 2)
    assert seen == ["ranking"]


@pytest.mark.parametrize("lowering", ["gather", "flex"])
def test_every_stage_is_timed(lowering, uncompiled_flex):
    shape = Shape(300, 24, lowering == "gather", 4, 2, 16)
    entry = profile(shape, inputs(shape, "cpu", torch.float32), lowering, 1, silent, compiler=uncompiled_flex)
    backward = ("attention backward", "gate gradient", "gate, its own backward") if shape.backward else ()
    stages = ("gate", *BEFORE_ATTENTION[lowering], "key/value gather", "attention forward", *backward)
    assert tuple(entry["seconds"]) == stages
    assert entry["whole"] > 0
    assert entry["failed"] == {}


# A suite


def test_the_gpu_suite_runs_through_and_records_what_fails(uncompiled_flex):
    """On a CPU, 1024 times smaller: all of it but the device."""
    suite = SUITES["gpu"].smaller(1024)
    results = measure.begun(suite, "gpu", 1, "float32", "cpu")
    saved = []
    measure.measure(
        suite, results, rounds=1, dtype=torch.float32, device="cpu", compiler=uncompiled_flex, budget=Budget(math.inf),
        save=lambda results: saved.append(json.dumps(results)),
    )  # fmt: skip
    assert results["failed"] == {}
    assert results["skipped"] == []
    assert all(results[section] for section in measure.SECTIONS)
    assert len(saved) == sum(len(results[section]) for section in measure.SECTIONS)
    # FlexAttention has no backward on a CPU: that stage fails, and the others of the same case do not.
    (stages,) = results["stages"]
    assert "no backward on a CPU" in stages["failed"]["whole"]
    assert stages["seconds"]["attention forward"] > 0
    assert {"atomics (default)", "transposed", "column"} == results["gate_gradient"][0]["share"].keys()
    text = report.markdown(json.loads(saved[-1]))
    for words in ("not installed", "no backward on a CPU", "launches by the host", "Forward against N", "| 1,024 |"):
        assert words in text


def test_a_case_that_fails_or_has_no_time_is_recorded(monkeypatch):
    suite = SUITES["quick"].smaller(64)
    monkeypatch.setattr(measure, "contenders", lambda *arguments: 1 / 0)
    results = measure.begun(suite, "quick", 1, "float32", "cpu")
    options = {"rounds": 1, "dtype": torch.float32, "device": "cpu"}
    measure.measure(suite, results, **options, budget=Budget(math.inf))
    assert results["failed"]["calls: forward, N=64 w=4"] == "ZeroDivisionError: division by zero"
    assert results["memory"]
    later = measure.begun(suite, "quick", 1, "float32", "cpu")
    measure.measure(suite, later, **options, budget=Budget(0))
    assert "calls: forward, N=64 w=4" in later["skipped"]
    assert "Cases skipped, as the time was spent:" in report.markdown(later)


def test_an_interruption_leaves_what_is_measured(monkeypatch, tmp_path, capsys):
    def interrupted(suite, results, *, save, **options):
        results["packing"].append(measure._packing(512, 32, 32, 32, "tiles,", silent))
        save(results)
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure", interrupted)
    assert main(["bench", "--suite", "quick", "--out", str(tmp_path)]) == INTERRUPTED
    assert "heavy hitters" in capsys.readouterr().out
    assert "heavy hitters" in json.loads((tmp_path / "bench-quick.json").read_text())["packing"][0]["ratios"]
    assert "heavy hitters" in (tmp_path / "bench-quick.md").read_text()


# Pages and pictures


def test_the_report_divides_by_the_fastest_causal_attention():
    case = {
        "shape": "s", "seconds": {"SDPA causal, flash": 3.0, "SDPA causal, efficient": 9.0, "flexdma": 1.5},
        "peak_bytes": {"SDPA causal, flash": 0, "SDPA causal, efficient": 0, "flexdma": 1 << 20},
        "failed": {"SDPA causal, cudnn": "RuntimeError: no"}, "visited_over_ideal": {}, "useful_flops": 3e9,
        "causal_flops": 6e9,
    }  # fmt: skip
    results = measure.begun(SUITES["quick"], "quick", 1, "float32", "cpu") | {"calls": [case]}
    text = report.markdown(results)
    assert "| s | flexdma | 1.5000 | 2.00 x | 2 |  | 1.0 MiB |" in text
    assert "| s | SDPA causal, flash | 3.0000 | 1.00 x | 2 |" in text
    assert "| s | SDPA causal, cudnn | RuntimeError: no |" in text


def test_tables_replace_what_stands_between_their_marks(tmp_path, capsys):
    page, picture, source = (tmp_path / name for name in ("page.md", "scaling.svg", "bench-cpu.json"))
    sizes = [{"length": n, "window": 8, "seconds": {"flexdma": n, "SDPA causal": n * n}} for n in (64, 128)]
    sizes = [size | {"failed": {}, "useful_flops": 1.0} for size in sizes]
    source.write_text(json.dumps(json.loads(RESULTS.read_text()) | {"lengths": sizes}))
    page.write_text("above\n<!-- bench cpu -->\nold\n<!-- end of bench cpu -->\nbelow\n")
    assert main(["bench", "--from", str(source), "--markdown", str(page), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out.strip()
    assert page.read_text() == f"above\n<!-- bench cpu -->\n\n{printed}\n\n<!-- end of bench cpu -->\nbelow\n"
    assert "| 128 | 128000.0 | 16384000.0 | 128.00 x |" in printed
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize("suite", ["cpu", "gpu"])
def test_the_page_of_the_docs_shows_the_results_beside_it(suite):
    page = (RESULTS.parent.parent / "benchmarks.md").read_text()
    source = RESULTS.with_name(f"bench-{suite}.json")
    text = report.markdown(json.loads(source.read_text()) if source.exists() else {"suite": suite})
    assert report.between(page, suite, text) == page, "python -m flexdma bench --from ... --markdown docs/benchmarks.md"


def gpu_results(forward=0.001):
    """What the GPU suite measures of its targets, made up."""
    sdpa, flops = (
        {"SDPA causal, flash": 0.007, "SDPA causal, cudnn": 0.006},
        {"useful_flops": 1e9, "causal_flops": 16e9},
    )
    about = flops | {"peak_bytes": {}, "failed": {}, "visited_over_ideal": {}}
    calls = [
        {"shape": str(FORWARD), "seconds": sdpa | {COMPILED: forward, FLEX_CAUSAL: 0.008}},
        {"shape": str(TRAINING), "seconds": sdpa | {COMPILED: 0.0002}},
    ]
    seconds = {WITHOUT: 0.008, "atomics (default)": 0.01, "column": 0.016}
    gradient = {
        "shape": "s",
        "lowering": "flex",
        "seconds": seconds,
        "share": {"atomics (default)": 0.2, "column": 0.5},
    }
    lengths = [
        {"length": shape.length, "window": 1024, "seconds": {"flexdma": 0.01, "selection": 0.0004 * (n + 1)}}
        for n, shape in enumerate(SUITES["gpu"].lengths)
    ]
    results = {"calls": calls, "gate_gradient": [gradient], "lengths": lengths}
    return measure.begun(SUITES["gpu"], "gpu", 5, "bfloat16", "cpu") | {
        section: [about | case for case in cases] for section, cases in results.items()
    }


def test_the_table_of_targets_is_filled_by_the_gpu_suite():
    text = report.markdown(gpu_results())
    for row in (
        "| forward, N=32768 w=1024: 5 times faster than the fastest causal SDPA (ideal 16) | 6.0 |",
        "| forward + backward, N=131072 w=1024: 20 times (ideal 64) | 30.0 |",
        "| gate gradient, of the backward: at most 20 % | 20.0% by atomics (default), 50.0% by column |",
        "| ranking + lifespans, of the forward, N = 4k to 1M: at most 10 % | **missed**: 4.0% at N=4096, 8.0% at N=32768,"
        " 12.0% at N=262144, 16.0% at N=1048576 |",
        "| useful rate / that of FlexAttention causal in the same run: at least 0.5 | 0.50 |",
    ):
        assert row in text
    assert "| **missed**: 3.0 |" in report.markdown(gpu_results(forward=0.002))


def test_the_gpu_suite_begins_with_its_targets():
    cases = measure._cases(SUITES["gpu"], 5, torch.bfloat16, "cuda", None, Budget(0))
    sections = [(section, title) for section, title, _ in cases]
    assert sections[:3] == [
        ("calls", str(FORWARD)),
        ("calls", str(TRAINING)),
        ("gate_gradient", "forward + backward, N=32768 w=1024"),
    ]
    assert [section for section, _ in sections[3:7]] == ["lengths"] * 4
    assert FORWARD.flex


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--budget", "-1"], "--budget: expected more than 0, got -1.0"),
        (["--from", "absent.json"], "absent.json"),
        (["--from", __file__], "--from: expected JSON that this command wrote"),
        (["--from", str(RESULTS), "--markdown", __file__], "expected the lines '<!-- bench cpu -->'"),
        pytest.param(
            ["--suite", "gpu"],
            "expected a CUDA device, found none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_bad_requests_are_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == CANNOT
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
