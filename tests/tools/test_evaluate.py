"""The command on small models: records with an oracle, one page for all contenders, joined runs, refusals, interruptions."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flexdma.__main__ import CANNOT, INTERRUPTED, main
from flexdma.integrations.transformers import convert_to_dma
from flexdma.tools.evaluate import models, presses
from flexdma.tools.evaluate.models import contenders
from flexdma.tools.evaluate.presses import PressContender
from flexdma.tools.long_context import measure
from flexdma.tools.long_context.contenders import FULL, WINDOW, Contender, full, keys_per_head, sinks_and_window
from flexdma.tools.long_context.needles import KINDS, make_needle
from flexdma.tools.long_context.summary import Summary
from flexdma.tools.records import Results
from tests.tools import fake_kvpress
from tests.tools.smollm2 import download_smollm2
from tests.tools.tiny_models import TEXT, byte_tokenizer, save, tiny_model

SIZES = ["--lengths", "600", "700", "--needles", "2", "--stretches", "2", "--rounds", "1"]
KEYS = 64
IDS = torch.tensor(byte_tokenizer()(TEXT)["input_ids"])


def converted_model(window=60, **options):
    """Gates that select: A is not 0."""
    model = convert_to_dma(tiny_model(), window, **{"sinks": 4, **options}).eval()
    torch.manual_seed(1)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.value_gate.A)
    model.config.flexdma["calibrated"] = {"tokens": 1}
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A plain model, a converted one, and two texts."""
    made = tmp_path_factory.mktemp("models")
    save(made / "plain", tiny_model())
    save(made / "converted", converted_model())
    (made / "one <b>.txt").write_text(TEXT)
    (made / "two.txt").write_text(TEXT[::-1])
    return made


@pytest.fixture(scope="module")
def run(folder):
    """The command, with the texts and small sizes: options -> exit code."""
    texts = ["--text", str(folder / "one <b>.txt"), str(folder / "two.txt")]

    def call(*options, sizes=SIZES):
        return main(["evaluate", *map(str, options), *texts, *sizes])

    return call


@pytest.fixture(scope="module")
def results(folder, run, tmp_path_factory) -> tuple[Path, Results]:
    out = tmp_path_factory.mktemp("out")
    assert run(folder / "plain", folder / "converted", "--out", out) == 0
    return out, Results.from_json((out / "evaluation.json").read_text())


def test_the_json_is_a_tidy_table(results):
    out, found = results
    written = json.loads((out / "evaluation.json").read_text())
    assert written["columns"] == ["section", "shape", "contender", "metric", "value"]
    assert {"device", "torch", "transformers", "flexdma", "threads"} <= written["machine"].keys()
    assert written["plan"] == {
        "lengths": [600, 700], "kinds": list(KINDS), "needles": 2, "seeds": [0], "stretches": 2, "rounds": 1, "keys": KEYS,
    }  # fmt: skip
    assert {name: one["keys"] for name, one in written["contenders"].items()} == {
        FULL: None, WINDOW: KEYS, "calibrated": KEYS,
    }  # fmt: skip
    measured = [record for record in found.records if record.metric != "skipped"]
    assert {record.shape for record in measured} == written["cases"].keys()
    # 2 texts x 2 stretches x (0-255, 256-511, 512-699, beyond); 4 kinds x 2 lengths x 2 depths; 2 lengths
    assert [sum(record.section == section for record in measured) for section in ("nll", "needles", "speed")] == [
        3 * 16, 3 * 16 * 2, 3 * 2 * 4,
    ]  # fmt: skip


def test_likelihoods_are_those_of_plain_forward_passes(results):
    stretch = IDS[None, len(IDS) - 700 :]
    for name, model in ((FULL, tiny_model()), ("calibrated", converted_model())):
        with torch.no_grad():
            likelihood = model(stretch).logits[0, :-1].log_softmax(-1).gather(1, stretch[0, 1:, None])[:, 0]
        for first, last in ((0, 256), (256, 512), (512, 700), (KEYS, 700)):
            expected = -likelihood[max(first - 1, 0) : last - 1].mean().item()
            (value,) = [record.value for record in results[1].records if record.contender == name
                        and record.shape == f"one <b>.txt, stretch 1, tokens {first} to {last - 1}"]  # fmt: skip
            assert value == pytest.approx(expected, rel=1e-4)


def test_sinks_and_window_see_the_last_keys_and_the_first():
    """Against eager attention with that mask."""
    model = tiny_model()
    contender = sinks_and_window(model, 60, 4)
    assert contender.keys == keys_per_head(contender.model) == KEYS
    ids, position = IDS[None, :200], torch.arange(200)
    distance = position[:, None] - position
    visible = (distance >= 0) & ((distance < 60) | (position < 4))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        mask = torch.where(visible, 0.0, -torch.inf)[None, None]
        logits = model(ids, attention_mask=mask).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    nll = contender.nll(ids)
    assert nll is not None
    torch.testing.assert_close(nll, expected, rtol=1e-4, atol=1e-4)
    shared = {weight.data_ptr() for weight in model.parameters()}
    assert all(weight.data_ptr() in shared for name, weight in contender.model.named_parameters() if "gate" not in name)


@torch.no_grad()
def test_a_value_is_exact_where_greedy_decoding_writes_it():
    """Over needles whose answers are what the model generates, and the same with another digit."""
    contender = full(tiny_model())
    needle = make_needle(byte_tokenizer(), [IDS], kind="digits", length=600, depth=0.5, seed=0)
    prompt = torch.cat([needle.context, needle.question])[None]
    greedy = contender.model.generate(prompt, max_new_tokens=7, do_sample=False, eos_token_id=None)[0, 600:]
    for answer, exact in ((greedy, True), (torch.cat([greedy[:6], greedy[6:] - 1]), False), (needle.answer, False)):
        other = replace(needle, answer=answer)
        assert measure.found(contender.answer(other), other)[0] is exact


def test_bytes_of_caches_are_those_of_keys_and_values(results):
    summary: Any = Summary(results[1])
    layers, heads, size, parts, item = 2, 2, 8, 2, 4
    for length in (600, 700):
        assert summary.speed(FULL, length, "cache_bytes") == layers * heads * size * parts * item * length
    slots = layers * heads * KEYS
    # A slot has a key, a value, and beside them less than one of them.
    least = slots * size * parts * item
    for name in (WINDOW, "calibrated"):
        found = {summary.speed(name, length, "cache_bytes") for length in (600, 700)}
        assert len(found) == 1
        assert least <= found.pop() < 2 * least


def test_the_page_shows_all_contenders(results):
    out, _ = results
    page = (out / "index.html").read_text()
    for name in (FULL, WINDOW, "calibrated", "two.txt", "needs kvpress"):
        assert name in page
    assert "one &lt;b&gt;.txt" in page
    assert "<b>" not in page
    assert "http:" not in page.replace('"http://www.w3.org', "")
    assert page.count("data:image/svg+xml") == 4  # two pictures, light and dark
    assert "prefers-color-scheme: dark" in page
    tables = (out / "tables.md").read_text()
    assert tables.count("| calibrated |") == 3 + 1 + 2  # two texts and their mean, needles, two lengths
    assert {path.name for path in out.iterdir()} == {
        "evaluation.json", "index.html", "tables.md", "nll-light.svg", "nll-dark.svg", "needles-light.svg",
        "needles-dark.svg",
    }  # fmt: skip


def test_tables_are_means_of_the_records():
    about: dict[str, Any] = {
        "contenders": {FULL: {}, WINDOW: {}, "mine": {}},
        "cases": {
            "a0": {"text": "a", "first": 0, "last": 9}, "a1": {"text": "a", "first": 0, "last": 9},
            "b": {"text": "b", "first": 0, "last": 9},
            "n0": {"kind": "keys", "seed": 0}, "n1": {"kind": "keys", "seed": 1}, "n2": {"kind": "digits", "seed": 0},
        },
    }  # fmt: skip
    found = Results(about)
    for case, values in {"a0": (1.0, 3.0, 2.0), "a1": (2.0, 4.0, 2.0), "b": (3.0, 4.0, 4.0)}.items():
        found.add("nll", case, [(name, "nll", value) for name, value in zip(about["contenders"], values, strict=True)])
    for case, exact in {"n0": (1, 0, 1), "n1": (1, 0, 0), "n2": (0, 0, 0)}.items():
        for name, value in zip(about["contenders"], exact, strict=True):
            found.add("needles", case, [(name, "exact", value), (name, "nll", 0.5)])
    summary = Summary(found)
    assert summary.nll("mine", 0, 9, "a") == 2.0
    assert summary.nll("mine", 0, 9) == 3.0  # each text counts once
    assert summary.gap_closed("mine", "a") == pytest.approx((3.5 - 2) / (3.5 - 1.5))
    assert summary.gap_closed(FULL) == 1
    assert summary.gap_closed(WINDOW) == 0
    assert summary.needles("mine") == (1, 3, 0.5, 0.5)
    assert summary.needles("mine", kind="digits") == (0, 1, None, 0.5)
    assert summary.needles("mine", seed=1) == (0, 1, 0.0, 0.5)
    assert summary.needles("absent") is None


# kvpress


@pytest.fixture
def kvpress(monkeypatch):
    """kvpress as if it were installed, with a press that works and one that fails."""
    monkeypatch.setitem(sys.modules, "kvpress", fake_kvpress.module())
    monkeypatch.setattr(models, "why_unavailable", lambda: None)
    monkeypatch.setattr(models, "PRESSES", {"StreamingLLM": True, "Knorm": False})


@pytest.mark.usefixtures("kvpress")
@torch.no_grad()
def test_a_press_answers_from_the_keys_it_keeps_after_a_full_prefill():
    """Against eager attention in which the question sees those keys, and the context sees all before it."""
    model = tiny_model()
    loaded = SimpleNamespace(model=model, tokenizer=byte_tokenizer(), choice=None, name="tiny")
    found = contenders([loaded], 60, 4, None)  # type: ignore[list-item]
    assert [one.name for one in found.measured] == [FULL, WINDOW, "StreamingLLM"]
    assert found.skipped == {"Knorm": "NotImplementedError: no press for LlamaForCausalLM"}
    press = found.measured[-1]
    assert isinstance(press, PressContender)
    assert press.nll(IDS[None]) is None
    needle = make_needle(byte_tokenizer(), [IDS], kind="values", length=600, depth=0.5, seed=0)
    context, rest = len(needle.context), len(needle.question) + len(needle.answer)
    position = torch.arange(context + rest)
    distance = position[:, None] - position
    kept = (position < 4) | (position >= context - 60)
    visible = (distance >= 0) & (kept | (position[:, None] < context))
    model.set_attn_implementation("eager")
    mask = torch.where(visible, 0.0, -torch.inf)[None, None]
    expected = model(needle.ids, attention_mask=mask).logits[0, -len(needle.answer) - 1 : -1]
    torch.testing.assert_close(press.answer(needle), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("kvpress")
def test_runs_that_measured_different_contenders_are_joined(folder, run, results, tmp_path, capsys):
    assert run(folder / "plain", "--budget", 60, "--presses", "StreamingLLM", "--out", tmp_path / "other") == 0
    files = [str(results[0] / "evaluation.json"), str(tmp_path / "other" / "evaluation.json")]
    capsys.readouterr()
    assert main(["evaluate", "--join", *files, "--out", str(tmp_path / "both")]) == 0
    out = capsys.readouterr().out
    assert "StreamingLLM: measured in another run" in out
    assert "SnapKV, ExpectedAttention, Knorm, ObservedAttention: skipped: needs kvpress" in out
    both = Results.from_json((tmp_path / "both" / "evaluation.json").read_text())
    assert list(both.about["contenders"]) == [FULL, WINDOW, "calibrated", "StreamingLLM"]
    mine = [record for record in both.records if record.contender != "StreamingLLM"]
    assert mine == [record for record in results[1].records if record.contender != "StreamingLLM"]
    summary: Any = Summary(both)
    assert summary.needles("StreamingLLM").cases == summary.needles(FULL).cases == 16
    page = (tmp_path / "both" / "index.html").read_text()
    assert all(name in page for name in both.about["contenders"])

    other = json.loads(Path(files[1]).read_text())
    for record in other["records"]:
        if record[0] == "nll":
            record[4] += 0.01
    Path(files[1]).write_text(json.dumps(other))
    refused(["--join", *files], "--join: expected the same model, with a likelihood of", capsys)
    other["plan"]["seeds"] = [1]
    Path(files[1]).write_text(json.dumps(other))
    refused(["--join", *files], f"--join: expected the plan of {files[0]}, got another in {files[1]}", capsys)
    Path(files[1]).write_text(json.dumps(other | {"suite": "cpu"}))
    refused(["--join", *files], f"--join: expected JSON that evaluate wrote, got {files[1]}, of 'cpu'", capsys)


def test_a_kvpress_that_takes_no_such_transformers_is_named(monkeypatch):
    monkeypatch.setattr(presses.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(presses.importlib.metadata, "version", {"kvpress": "0.5.5", "transformers": "5.23.0"}.get)
    needs = ["torch<3", "transformers<5.3,>=4.56.0"]
    monkeypatch.setattr(presses.importlib.metadata, "requires", lambda name: needs)
    assert presses.why_unavailable() == (
        "kvpress 0.5.5 needs transformers <5.3,>=4.56.0, got 5.23.0: measure it in an environment of its own, and join the "
        "results by --join"
    )
    monkeypatch.setattr(presses.importlib.metadata, "requires", lambda name: ["transformers>=5"])
    assert presses.why_unavailable() is None


# Refusals and interruptions


def refused(options, message, capsys):
    assert main(["evaluate", *map(str, options)]) == CANNOT
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_refusals(folder, capsys, tmp_path):
    plain, converted = folder / "plain", folder / "converted"
    text = ["--text", folder / "two.txt"]
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfd")
    save(tmp_path / "other", converted_model(window=30))
    save(tmp_path / "endless", convert_to_dma(tiny_model(), None, selection="threshold"))
    save(tmp_path / "bloom", tiny_model("Bloom", n_layer=2, n_head=4))
    capsys.readouterr()  # bars of saving
    for options, message in (
        ([], "MODEL: expected a hub name, a model folder or a .gguf file, got none"),
        ([folder / "absent"], "which does not exist"),
        ([plain, *text, "--lengths", "9000"], "--text: expected at least 9,000 tokens, as many as the longest of"),
        ([plain, *text, "--lengths", "200"], "--lengths: expected one of more than 260 tokens, which is --budget and"),
        ([plain, *text, "--budget", "9", "--lengths", "300"], "--lengths: expected at least"),
        ([plain, "--text", tmp_path / "bytes.txt"], "--text: expected UTF-8, got other bytes in"),
        ([plain, "--text", folder / "two.txt", folder / "two.txt"], "got two of the name two.txt"),
        ([plain, *text, "--presses", "Knorm"], "--presses: needs kvpress: pip install"),
        ([plain, *text, "--presses", "Nonesuch"], "--presses: invalid choice: 'Nonesuch'"),
        ([converted, *text, "--budget", "50"], "--budget: expected 60, as the converted models keep 64 keys per"),
        ([converted, *text, "--sinks", "64"], "--sinks: expected fewer than the 64 keys that the converted models keep, got"),
        ([converted, tmp_path / "other", *text], "MODEL: expected converted models that keep equal numbers of keys, got"),
        ([converted, plain, *text], "MODEL: expected models converted by flexdma after the first, got"),
        ([plain, tmp_path / "endless", *text], "model: expected layers with windows, got selection='threshold' with"),
        ([tmp_path / "bloom", *text], "cannot be converted (docs/transformers.md has the families): model: expected"),
        (["--join", folder / "two.txt"], "--join: expected JSON that evaluate wrote, got"),
        ([plain, "--join", folder / "two.txt"], "--join: expected no MODEL beside it, got"),
        (["--resume", "--join", folder / "two.txt"], "--join: expected no --resume beside it, got both"),
    ):  # fmt: skip
        refused(options, message, capsys)


def test_an_interruption_keeps_what_was_measured_and_resume_adds_the_rest(folder, run, results, tmp_path, monkeypatch):
    calls = iter(range(100))
    answer = Contender.answer

    def interrupted(self, needle):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return answer(self, needle)

    with monkeypatch.context() as patch:
        patch.setattr(Contender, "answer", interrupted)
        assert run(folder / "plain", "--out", tmp_path, "--budget", 60) == INTERRUPTED
    found = Results.from_json((tmp_path / "evaluation.json").read_text())
    assert sum(record.metric == "exact" for record in found.records) == 4
    page = (tmp_path / "index.html").read_text()
    assert page.endswith("</html>\n")
    assert WINDOW in page
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())

    asked: list[str] = []

    def counted(self, needle):
        asked.append(self.name)
        return answer(self, needle)

    monkeypatch.setattr(Contender, "answer", counted)
    assert run(folder / "plain", folder / "converted", "--out", tmp_path, "--resume") == 0
    assert [asked.count(name) for name in (FULL, WINDOW, "calibrated")] == [14, 14, 16]
    resumed = Results.from_json((tmp_path / "evaluation.json").read_text())
    assert resumed.about.keys() == results[1].about.keys()
    assert resumed.about["contenders"] == results[1].about["contenders"]
    assert resumed.about["models"] == results[1].about["models"]

    def without_times(found):
        return {record for record in found.records if record.section != "speed"}

    assert without_times(resumed) == without_times(results[1])
    assert len(resumed.records) == len(results[1].records)


def test_resume_measures_speeds_in_turns_again(folder, run, results, tmp_path):
    whole = json.loads((results[0] / "evaluation.json").read_text())
    kept = [record for record in whole["records"] if record[0] != "speed" or record[2] != "calibrated"]
    old = [[*record[:4], 1e9] if record[0] == "speed" else record for record in kept]
    (tmp_path / "evaluation.json").write_text(json.dumps(whole | {"records": old}))
    assert run(folder / "plain", folder / "converted", "--resume", "--out", tmp_path) == 0
    found = Results.from_json((tmp_path / "evaluation.json").read_text()).records
    assert {record[:4] for record in found} == {record[:4] for record in results[1].records}
    assert len(found) == len(results[1].records)
    assert all(record.value != 1e9 for record in found)


def test_resume_refuses_what_would_mix_numbers(folder, run, results, tmp_path, capsys):
    whole = json.loads((results[0] / "evaluation.json").read_text())
    other = {name: {**case, "tokens": 0} if "depth" in case else case for name, case in whole["cases"].items()}
    capsys.readouterr()
    for change, options, message in (
        ({}, ["--seed", 1], "--resume: expected the seeds of"),
        ({"machine": {**whole["machine"], "torch": "1.0"}}, [], "--resume: expected the machine's torch of"),
        ({"dtype": "bfloat16"}, [], "--resume: expected the dtype of"),
        ({"suite": "cpu"}, [], "--resume: expected a folder that evaluate wrote, got"),
        ({"cases": other}, [], "evaluation.json in pass key, 600 tokens, depth 0.05, seed 0, got others"),
        ({"models": whole["models"][1:]}, [], f"MODEL: expected {folder / 'converted'} at the same place as in"),
        ({"models": [*whole["models"], {"name": "third"}]}, [], "MODEL: expected third at the same place as in"),
        ({"models": [whole["models"][0], {**whole["models"][1], "weights": 0}]}, [], "converted with other weights"),
        ({"plan": {}}, [], "--resume: expected the lengths of"),
    ):  # fmt: skip
        before = json.dumps(whole | change)
        (tmp_path / "evaluation.json").write_text(before)
        models = folder / "plain", folder / "converted"
        assert run(*models, *options, "--resume", "--out", tmp_path) == CANNOT, message
        assert message in capsys.readouterr().err
        assert (tmp_path / "evaluation.json").read_text() == before
    # There is nothing to go on from.
    (tmp_path / "evaluation.json").unlink()
    assert run(folder / "plain", "--resume", "--needles", 0, "--rounds", 0, "--out", tmp_path) == 0


def test_windows_per_head_count_by_their_mean():
    model = converted_model([[20, 41], [60, 60]], recent=[10, 0])
    assert keys_per_head(model) == (34 + 55 + 64 + 64) / 4


@pytest.mark.network
@pytest.mark.slow
def test_a_real_model(tmp_path):
    """With full attention SmolLM2-135M finds needles that are out of reach behind 64 keys."""
    assert (
        main(["evaluate", str(download_smollm2(tmp_path)), "--quick", "--budget", "60", "--out", str(tmp_path / "out")])
        == 0
    )
    summary: Any = Summary(Results.from_json((tmp_path / "out" / "evaluation.json").read_text()))
    assert summary.needles(FULL).rate >= 0.75
    assert summary.needles(WINDOW).rate == 0
    assert summary.nll(FULL, 64, 1024) < summary.nll(WINDOW, 64, 1024)
