"""The suite "decode": every contender runs at tiny shapes, the caches are those of a forward pass, tables and targets."""

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from flexdma.__main__ import CANNOT, main
from flexdma.tools.bench import decoding, report
from flexdma.tools.bench.decoding import GROWING, OURS, SCALE, SLOPE, STATIC, Decoder, contender
from flexdma.tools.bench.decoding_models import filled_cache, models
from flexdma.tools.bench.sections import Setting, begun, planned
from flexdma.tools.bench.suites import SUITES
from flexdma.tools.language_models import cache_argument
from flexdma.tools.records import Results
from flexdma.tools.timing import Turns

TINY = Decoder(
    2, (16, 40), window=6, sinks=2, layers=2, hidden=32, intermediate=48, vocabulary=64, query_heads=4, heads=2, size=8
)
SETTING = Setting("cpu", torch.float32)


def results(*sections, decoder=TINY):
    suite = replace(SUITES["decode"], decoding=tuple((section, decoder) for section in sections))
    found = begun(suite, "decode", 1, SETTING)
    for case in planned(suite, "cpu"):
        found.add(case.section, case.title, case.measure(SETTING, Turns(1)))
    return Results.from_json(found.to_json())


@pytest.mark.parametrize("compiled", [False, True])
def test_every_contender_is_timed_at_every_context(compiled):
    with torch.compiler.set_stance("force_eager"):
        found = results("decode layers", "decode models", "prefill", decoder=replace(TINY, compiled=compiled))
    for section, names in (
        ("decode layers", (GROWING, STATIC, OURS)),
        ("decode models", (GROWING, STATIC, OURS)),
        ("prefill", (GROWING, OURS)),
    ):
        (case,) = found.cases(section)
        assert not case.metric("failed")
        assert set(case.seconds) == {contender(context, name) for context in (16, 40) for name in names}
    text = report.markdown(found)
    assert "One token, whole model:" in text
    assert "Prefill of a whole model:" in text
    assert f"| B=2, {'compiled' if compiled else 'eager'} | 40 |" in text


def test_a_calibrated_model_has_targets_of_its_own():
    found = results("decode models", decoder=replace(TINY, calibrated=True))
    (case,) = found.cases("decode models")
    assert case.title == "B=2, eager, calibrated"
    assert not case.metric("failed")
    assert "| B=2, eager, calibrated | 40 |" in report.markdown(found)
    seconds = {GROWING: 4.0, STATIC: 3.0, OURS: 2.0}
    for context in (4096, 16384):
        rows = ((contender(context, name), "seconds", s) for name, s in seconds.items())
        found.add("decode models", "B=1, eager, calibrated", rows)
    text = report.markdown(found)
    assert "| a token of a calibrated model, N = 4096: at most the time of the faster full cache | 1.50" in text
    assert "| a token of a calibrated model, N = 16384: 2 times faster | **missed**: 1.50" in text
    assert "| a token of a model, N = 16384: 2 times faster | not measured |" in text


@torch.no_grad()
def test_a_calibrated_model_decodes_in_runs_with_gates_of_unit_spread():
    decoder = replace(TINY, calibrated=True, layers=4)
    full, converted = models(decoder, torch.float32)
    cache = filled_cache(decoder, 40, OURS, full)
    seen = []
    gate = converted.model.layers[2].self_attn.value_gate
    gate.register_forward_hook(lambda gate, args, gates: seen.append(gates))
    ids = torch.randint(TINY.vocabulary, (2, 60))
    converted(ids)
    distances = torch.arange(60) * SCALE * SLOPE
    assert 0.3 < (seen[0] - distances).std() / SCALE < 3
    converted(ids[:, :1], **{cache_argument(): cache})
    assert all(layer._run is not None for layer in cache.layers)
    windows: list[Any] = [decoder.window_size(layer) for layer in range(30)]
    assert len(set(windows)) == 11
    assert 110 < sum(map(sum, windows)) / 60 < 146


def test_a_context_that_does_not_fit_is_a_row_with_the_reason():
    with mock.patch.object(decoding, "free_bytes", return_value=20_000.0):
        text = report.markdown(results("decode models"))
    assert "skipped: a full cache of N=40 needs 0 GiB" in text
    assert "not measured" in text


@torch.no_grad()
def test_a_filled_cache_goes_on_as_one_of_a_forward_pass():
    full, converted = models(TINY, torch.float32)
    ids = torch.randint(TINY.vocabulary, (2, 41))
    for name, model in ((GROWING, full), (STATIC, full), (OURS, converted)):
        cache = filled_cache(TINY, 40, name, full)
        assert int(cache.get_seq_length()) == 40
        logits = model(ids[:, 40:], **{cache_argument(): cache}).logits
        assert logits.shape == (2, 1, TINY.vocabulary)
        assert int(cache.get_seq_length()) == 41
    state = TINY.state(40, torch.float32)
    # Equal gates keep the newest, and the sinks.
    assert state.position.sort(-1).values.tolist() == [[[0, 1, *range(34, 40)]] * 2] * 2


def test_targets_judge_the_slowest_case_against_the_faster_full_cache():
    found = begun(SUITES["decode"], "decode", 1, SETTING)
    for context, ours in ((256, 9.0), (512, 2.0), (16384, 2.0)):
        seconds = {GROWING: 4.0, STATIC: 3.0, OURS: ours}
        found.add("decode models", "B=1, eager", ((contender(context, n), "seconds", s) for n, s in seconds.items()))
    text = report.markdown(found)
    assert (
        "| a token of a model, N >= 512: at most the time of the faster full cache | 1.50 at least (B=1, eager" in text
    )
    assert "2 times faster | **missed**: 1.50 at least (B=1, eager, N=16384) |" in text
    assert "| B=1, eager | 256 | 4000.000 | 3000.000 | 9000.000 | 0.44 x | 0.33 x |" in text


def test_without_transformers_the_suite_names_the_extra(capsys):
    with mock.patch("importlib.util.find_spec", side_effect=lambda name: None if name == "transformers" else object()):
        assert main(["bench", "--suite", "decode"]) == CANNOT
    assert "needs transformers: pip install flexdma[transformers]" in capsys.readouterr().err
