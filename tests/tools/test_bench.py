"""The benchmark without real timings: medians, memory, failures, budgets, the contenders' results, a suite, pages."""

import contextlib
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex

import flexdma
from flexdma.__main__ import CANNOT, INTERRUPTED, main
from flexdma.reference import dense_dynamic_mask_attention, dense_visibility
from flexdma.stages import observed
from flexdma.tools import budget, timing
from flexdma.tools.bench import command, report, sections
from flexdma.tools.bench.contenders import ANY_LIFESPANS, DENSE, FLEX_CAUSAL, contenders
from flexdma.tools.bench.dense_mask import check_fits, dense_mask_attention
from flexdma.tools.bench.gradients import WITHOUT, gradient_shares
from flexdma.tools.bench.masks import build_masks
from flexdma.tools.bench.sections import Setting, begun, planned
from flexdma.tools.bench.suites import FORWARD, SECTIONS, SUITES, TRAINING
from flexdma.tools.bench.visited import living_pairs, packing_ratios, visited_over_ideal
from flexdma.tools.budget import Budget
from flexdma.tools.gate_families import autoregressive, gate_families
from flexdma.tools.marks import between
from flexdma.tools.records import Results
from flexdma.tools.shapes import Shape, inputs
from flexdma.tools.stages import BEFORE_ATTENTION, WHOLE, Ledger, profile
from flexdma.tools.timing import Prepared, Turns, UnavailableError, interleaved, peak_bytes
from flexdma.tools.whole_calls import COMPILED, COMPILED_DEFAULT, COMPILED_PLAIN, EAGER
from tests.tools.hand_moved_clock import HandMovedClock

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

RESULTS = Path(__file__).parents[2] / "docs/results/bench-cpu.json"


# Timing


def test_contenders_take_turns_and_the_first_round_is_not_counted():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    measured = interleaved(calls, Turns(2), memory=False)
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

    measured = interleaved({"late": fails_later, "absent": absent, "good": lambda: None}, Turns(3))
    assert measured.failed == {"late": "RuntimeError: out of memory", "absent": "not installed"}
    assert set(measured.seconds) == {"good"}


def test_what_a_failed_contender_held_is_gone_when_memory_is_released(monkeypatch):
    held, gone = [], []

    def fails():
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(timing, "release", lambda: gone.append(held[0]() is None))
    measured = interleaved({"fails": fails}, Turns(1), memory=False)
    assert measured.failed == {"fails": "OutOfMemoryError: CUDA out of memory"}
    assert gone == [True]


def test_no_run_begins_that_the_budget_does_not_last_for(monkeypatch):
    clock = HandMovedClock()
    runs = {name: lambda: clock.take(1) for name in "ab"}  # the first two are not counted
    measured = interleaved(runs, Turns(9, budget=Budget(30, clock)), memory=False)
    assert measured.rounds == {"a": 6, "b": 6}  # of a share of 7.5 seconds each
    monkeypatch.setattr(budget, "SHARE", 1)
    measured = interleaved(runs, Turns(9, budget=Budget(6.5, clock)), memory=False)
    assert measured.rounds == {"a": 2, "b": 2}
    assert interleaved(runs, Turns(9, budget=Budget(0))).failed == dict.fromkeys(
        runs, "skipped: the suite's 0 seconds are used up"
    )


def test_slow_contenders_run_fewer_times():
    clock = HandMovedClock()
    runs = {"slow": lambda: clock.take(5), "good": lambda: None}
    measured = interleaved(runs, Turns(50, budget=Budget(now=clock)), memory=False)
    assert measured.rounds == {"slow": timing.LEAST, "good": 50}


def test_only_the_run_of_a_prepared_contender_is_timed():
    clock = HandMovedClock()
    prepared = Prepared(lambda: clock.take(7), lambda made: clock.take(1))
    measured = interleaved({"a": prepared}, Turns(1, budget=Budget(now=clock)), memory=False)
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
    for lowering in ("flex", "gather"):
        assert peak_bytes(partial(build_masks, lowering, shape, gate, torch.float32)) < shape.length**2 / 4


def test_there_are_seven_families_and_packing_helps_in_each():
    assert len(gate_families(256)) == 7
    for natural, packed in packing_ratios(4096, 256, 64, 64).values():
        assert 1 <= packed < natural


def test_the_autoregressive_family_is_its_recurrence():
    noise = torch.randn(50, dtype=torch.float64)
    want = [noise[0]]
    for step in noise[1:]:
        want.append(0.98 * want[-1] + step)
    torch.testing.assert_close(autoregressive(noise, 0.98), torch.stack(want))


def test_the_dense_path_computes_dynamic_mask_attention():
    leaves = [torch.randn(2, heads, 50, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    # No ties, which topk breaks arbitrarily.
    leaves.append(torch.randn(2, 2, 50, dtype=torch.float64, requires_grad=True))
    query, key, value, gate = leaves
    got = dense_mask_attention(query, key, value, gate, 12)
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
def uncompiled():
    """A compiler that compiles nothing, and FlexAttention that accepts CPU tensors with gradients."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(mock.patch.object(torch_flex, "_validate_device", return_value=None))
        yield lambda function, mode=None: function


def test_every_contender_that_masks_by_gates_gives_the_same(uncompiled):
    shape = Shape(200, 24, False, 4, 2, 16, every=True)
    tensors = inputs(shape, "cpu", torch.float32)
    calls: dict[str, Any] = contenders(shape, tensors, uncompiled)  # steps, whose first argument is the call
    want = dense_dynamic_mask_attention(*tensors, window_size=24)
    same = [
        name for name in calls if name in visited_over_ideal(shape, tensors[3], torch.float32) and "causal" not in name
    ]
    assert len(same) == 5
    for name in [*same, ANY_LIFESPANS]:
        torch.testing.assert_close(calls[name].args[0](), want, atol=1e-5, rtol=1e-4)


def test_visited_over_ideal_counts_pairs():
    shape = Shape(256, 256, False, 4, 2, 16)
    ratios = visited_over_ideal(shape, torch.zeros(1, 2, 256), torch.float32)
    assert ratios["SDPA causal"] == 1  # nothing is ever evicted
    assert ratios[DENSE] == pytest.approx(256 * 256 / (256 * 257 / 2))
    assert ratios[COMPILED_PLAIN] == pytest.approx(256 * (256 + 128) / (256 * 257 / 2))


def test_living_pairs_are_the_keys_that_a_block_sees():
    gate = torch.randn(2, 2, 100)
    seen = dense_visibility(gate, window_size=12)
    blocks = [rows.any(2).sum().item() * 32 for rows in seen.split(32, 2)]
    assert living_pairs(flexdma.causal_top_w(gate, 12), 32) == sum(blocks)


# Stages


def test_a_ledger_counts_what_runs_inside_a_stage_once(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 10.0])
    monkeypatch.setattr("flexdma.tools.stages.time.perf_counter", lambda: next(clock))
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
    assert seen == ["lifespans", "ranking"]


@pytest.mark.parametrize("lowering", ["gather", "flex"])
def test_every_stage_is_timed(lowering, uncompiled):
    shape = Shape(300, 24, lowering == "gather", 4, 2, 16)
    measured = profile(shape, inputs(shape, "cpu", torch.float32), lowering, Turns(1), uncompiled)
    backward = ("attention backward", "gate gradient", "gate, its own backward") if shape.backward else ()
    stages = ("gate", *BEFORE_ATTENTION[lowering], "key/value gather", "attention forward", *backward)
    assert tuple(measured.seconds) == (WHOLE, *stages)
    assert measured.failed == {}


# A suite


def smaller(suite, factor):
    """The same cases at 1 / factor of every N and w, to run them without measuring."""

    def each(shape):
        return replace(shape, length=max(16, shape.length // factor), window=max(4, shape.window // factor))

    return replace(
        suite,
        **{name: tuple(map(each, getattr(suite, name))) for name in SECTIONS},
        stages=tuple((lowering, each(shape)) for lowering, shape in suite.stages),
        packing=(max(256, suite.packing[0] // factor), max(16, suite.packing[1] // factor)),
    )


def test_the_gpu_suite_runs_through_and_records_what_fails(uncompiled):
    """On a CPU, 1024 times smaller, and in this process."""
    suite, setting = smaller(SUITES["gpu"], 1024), Setting("cpu", torch.float32, compiler=uncompiled)
    results = begun(suite, "gpu", 1, setting)
    for case in planned(suite, "cpu"):
        results.add(case.section, case.title, case.measure(setting, Turns(1)))
    results = Results.from_json(results.to_json())
    # FlexAttention has no backward on a CPU, so this stage fails, and the other stages of the case do not.
    (stages,) = results.cases("stages")
    assert "no backward on a CPU" in stages.metric("failed")[WHOLE]
    assert stages.seconds["attention forward"] > 0
    (gradient,) = results.cases("gate gradient")
    assert {"transposed (default)", "atomics", "column"} == gradient_shares(gradient.seconds).keys()
    text = report.markdown(results)
    for words in (
        "not installed", "no backward on a CPU", "launches by the host", "Forward against N", "| 1,024 |",
        "Compared with other", "Gate gradient, by route", "Forward against w", "Visited blocks / ideal", "a Q x K mask",
    ):  # fmt: skip
        assert words in text


def test_ratios_that_fail_lose_no_times(monkeypatch):
    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(sections, "contenders", lambda *arguments: {"good": lambda: None})
    monkeypatch.setattr(sections, "visited_over_ideal", out_of_memory)
    rows = list(sections.measure_calls(Shape(16, 4, False), Setting("cpu", torch.float32), Turns(1)))
    assert ("visited / ideal", "failed", "OutOfMemoryError: no") in rows
    assert ("good", "rounds", 1) in rows


def test_an_interruption_leaves_what_is_measured(monkeypatch, tmp_path, capsys):
    def interrupted(cases, results, setting, turns, *, save, progress):
        results.add(
            "packing", "N=512 w=32", [("heavy hitters", "natural order", 3.0), ("heavy hitters", "packed", 2.0)]
        )
        save(results)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure_all", interrupted)
    assert main(["bench", "--suite", "quick", "--out", str(tmp_path)]) == INTERRUPTED
    row = "| heavy hitters | 3.00 | 2.00 |"
    assert row in capsys.readouterr().out
    assert row in report.markdown(Results.from_json((tmp_path / "bench-quick.json").read_text()))
    assert row in (tmp_path / "bench-quick.md").read_text()


# Pages and pictures


def results_of(suite, **sections):
    """Invented results with these {case title: {contender: seconds}} by section."""
    results = begun(SUITES[suite], suite, 5, Setting("cpu", torch.bfloat16))
    for section, cases in sections.items():
        for title, seconds in cases.items():
            results.add(section.replace("_", " "), title, ((name, "seconds", s) for name, s in seconds.items()))
    return results


def test_the_report_divides_by_the_fastest_causal_attention():
    shape = SUITES["quick"].calls[0]
    flash, efficient, seconds = "SDPA causal, flash", "SDPA causal, efficient", shape.useful_flops() / 2e9
    times = {flash: 2 * seconds, efficient: 6 * seconds, "flexdma": seconds}
    results = results_of("quick", calls={str(shape): times})
    results.add(
        "calls", str(shape), [("flexdma", "peak_bytes", 1 << 20), ("SDPA causal, cudnn", "failed", "Error: no")]
    )
    text = report.markdown(results)
    assert f"| {shape} | flexdma | {seconds:.4f} | 2.00 x | 2 |  | 1.0 MiB |" in text
    assert f"| {shape} | {flash} | {2 * seconds:.4f} | 1.00 x | 8 |" in text  # N / 2 keys in place of 256
    assert f"| {shape} | SDPA causal, cudnn | Error: no |" in text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"columns": null}'])
def test_what_is_no_table_of_records_is_refused(text):
    with pytest.raises(ValueError, match=r"Expecting value|columns: expected"):
        Results.from_json(text)
    good = results_of("quick", calls={"a": {"flexdma": 1.0}})
    assert Results.from_json(good.to_json()) == good
    for name in ("shapes", "records"):
        with pytest.raises(ValueError, match=name):
            Results.from_json(good.to_json().replace(f'"{name}"', '"others"'))


def test_cases_that_fail_or_are_skipped_are_listed():
    results = results_of("quick")
    results.add("calls", "a", [("", "failed", "ZeroDivisionError: division by zero")])
    results.add("stages of flex", "b", [("", "skipped", "skipped: the suite's 1 seconds are used up")])
    text = report.markdown(results)
    assert "Cases that failed:\n\n- calls: a: ZeroDivisionError: division by zero\n" in text
    assert "Cases skipped, because the time was used up:\n\n- stages of flex: b\n" in text


def test_tables_replace_what_stands_between_their_marks(tmp_path, capsys):
    page, picture, source = (tmp_path / name for name in ("page.md", "scaling.svg", "bench-cpu.json"))
    lengths = {str(s): {"flexdma": s.length, "SDPA causal": 8 * s.length} for s in SUITES["cpu"].lengths[:2]}
    source.write_text(results_of("cpu", lengths=lengths).to_json())
    page.write_text("above\n<!-- bench cpu -->\nold\n<!-- end of bench cpu -->\nbelow\n")
    assert main(["bench", "--from", str(source), "--markdown", str(page), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out.strip()
    assert page.read_text() == f"above\n<!-- bench cpu -->\n\n{printed}\n\n<!-- end of bench cpu -->\nbelow\n"
    assert "| 8,192 | 8192000.0 | 65536000.0 | 8.00 x |" in printed
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize("suite", ["cpu", "decode", "gpu"])
def test_the_page_of_the_docs_shows_the_results_beside_it(suite):
    page = (RESULTS.parent.parent / "benchmarks.md").read_text()
    source = RESULTS.with_name(f"bench-{suite}.json")
    text = report.markdown(Results.from_json(source.read_text()) if source.exists() else Results({"suite": suite}))
    assert between(page, f"bench {suite}", text) == page, (
        "python -m flexdma bench --from ... --markdown docs/benchmarks.md"
    )


def gpu_results(forward=0.001):
    """Invented results of the GPU suite for its targets."""
    sdpa = {"SDPA causal, flash": 0.007, "SDPA causal, cudnn": 0.006}
    lengths = enumerate(SUITES["gpu"].lengths)
    return results_of(
        "gpu",
        calls={
            str(FORWARD): sdpa | {COMPILED: forward, FLEX_CAUSAL: 0.01},
            str(TRAINING): sdpa | {COMPILED: 0.0002},
        },
        gate_gradient_of_flex={str(TRAINING): {WITHOUT: 0.008, "transposed (default)": 0.01, "column": 0.016}},
        lengths={str(s): {"flexdma": 0.01, "selection": 0.0004 * (n + 1)} for n, s in lengths},
    )


def test_the_table_of_targets_is_filled_by_the_gpu_suite():
    text = report.markdown(gpu_results())
    for row in (
        "| forward, N=32768 w=1024: 5 times faster than the fastest causal SDPA (ideal 16) | 6.0 |",
        "| forward + backward, N=131072 w=1024: 20 times (ideal 64) | 30.0 |",
        "| gate gradient, of the backward: at most 20 % | 20.0% by transposed (default), 50.0% by column |",
        "| ranking + lifespans, of the forward, N = 4k to 1M: at most 10 % | **missed**: 4.0% at N=4096, 8.0% at N=32768,"
        " 12.0% at N=262144, 16.0% at N=1048576 |",
        "| useful rate / that of FlexAttention causal in the same run: at least 0.5 | 0.62 |",
    ):
        assert row in text
    assert "| **missed**: 3.0 |" in report.markdown(gpu_results(forward=0.002))


def test_the_table_of_targets_is_filled_by_the_cpu_suite():
    forward, _, _, training = SUITES["cpu"].calls
    results = results_of(
        "cpu",
        calls={
            str(forward): {"SDPA causal": 2.0, EAGER: 0.4, COMPILED_DEFAULT: 0.5, COMPILED: 0.8},
            str(training): {"SDPA causal": 2.0, EAGER: 0.5, COMPILED_DEFAULT: 0.5},
        },
        lengths={str(SUITES["cpu"].lengths[0]): {"flexdma": 0.01, "selection": 0.0004}},
    )
    mib, numbers = 2**20, training.length * training.size * 4
    results.add("calls", str(training), [(EAGER, "peak_bytes", numbers * (3 * 8 + 2 * 2 + 2 / 64 + 1.25 * 2 * 2))])
    text = report.markdown(results)
    assert numbers == 2 * mib
    for row in (
        f"| {forward}: 4.5 times faster than causal SDPA | 5.0 ({EAGER}), 4.0 ({COMPILED_DEFAULT}), 2.5 ({COMPILED}) |",
        f"| {training}: 5.0 times faster than causal SDPA | **missed**: 4.0 ({EAGER}), 4.0 ({COMPILED_DEFAULT}) |",
        f"| the compiled call, over the eager one: at least 1 | **missed**: 0.80 at {forward}, 1.00 at {training} |",
        f"at most 1.5 times key and value | 1.2 at {training} |",
        "| ranking + lifespans, of the forward, N = 4k to 1M: at most 5 % | 4.0% at N=4096 |",
    ):
        assert row in text


def test_the_gpu_suite_begins_with_its_targets():
    cases = [(section, title) for section, title, _ in planned(SUITES["gpu"], "cuda")]
    assert cases[:3] == [
        ("calls", str(FORWARD)),
        ("calls", str(TRAINING)),
        ("gate gradient of flex", "forward + backward, N=32768 w=1024"),
    ]
    assert [section for section, _ in cases[3:7]] == ["lengths"] * 4
    assert FORWARD.flex


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds: expected at least 1, got 0"),
        (["--budget", "-1"], "--budget: expected more than 0, got -1.0"),
        (["--from", "absent.json"], "absent.json"),
        (["--from", __file__], "--from: expected JSON that this version of the benchmark wrote"),
        (["--from", str(RESULTS), "--markdown", __file__], "expected the lines '<!-- bench cpu -->'"),
        (["--suite", "quick", "--plot", "scaling.svg"], "--plot: expected a suite that measures several lengths"),
        (["--plot", "scaling.bad"], "--plot: expected a file name that ends in one of"),
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
