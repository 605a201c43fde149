"""The command on small models: the folder is what `calibrate` makes, records have an oracle, interruptions and refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from flexdma.__main__ import CANNOT, INTERRUPTED, main
from flexdma.integrations.transformers import calibrate, convert_to_dma, from_pretrained, recall_sequences
from flexdma.tools.long_context.contenders import FULL, WINDOW, Contender
from flexdma.tools.long_context.summary import Summary
from flexdma.tools.records import Results
from flexdma.tools.retrofit import conversion
from flexdma.tools.retrofit.texts import parts
from tests.tools.smollm2 import download_smollm2
from tests.tools.tiny_models import TEXT, byte_tokenizer, save, tiny_model, write_gguf

LONG = TEXT * 2
SMALL = ["--budget", "61", "--sinks", "3", "--tokens", "3000", "--sequence", "1300"]
SIZES = [*SMALL, "--lengths", "600", "--needles", "1", "--stretches", "1", "--rounds", "1", "--dtype", "float32"]
MODEL_FILES = {
    "config.json", "generation_config.json", "model.safetensors", "modeling_flexdma.py", "tokenizer.json",
    "tokenizer_config.json", "retrofit",
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A plain model and two texts."""
    made = tmp_path_factory.mktemp("given")
    save(made / "plain", tiny_model())
    (made / "one.txt").write_text(LONG)
    (made / "two <b>.txt").write_text(TEXT[::-1])
    return made


@pytest.fixture(scope="module")
def run(given):
    """The command on the plain model, with the texts and small sizes: DIR, options -> exit code."""

    def call(out, *options):
        texts = ["--text", given / "one.txt", "--evaluation-text", given / "two <b>.txt"]
        return main(["retrofit", *map(str, [given / "plain", *texts, "--out", out, *SIZES, *options])])

    return call


@pytest.fixture(scope="module")
def out(run, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("made") / "model"
    assert run(made) == 0
    return made


def records(out: Path) -> Results:
    return Results.from_json((out / "retrofit" / "evaluation.json").read_text())


def test_the_folder_is_the_model_that_calibrate_makes(out):
    assert {path.name for path in out.iterdir()} == MODEL_FILES
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    tokenizer, model = byte_tokenizer(), tiny_model()
    first = LONG[: LONG.index("\n", len(LONG) * 3 // 4) + 1]
    batches = recall_sequences(tokenizer, first, length=1300, count=3, seed=0)
    found = calibrate(model, batches, window_size=46, recent=15, sinks=3)
    loaded = from_pretrained(out)
    assert loaded.config.flexdma == model.config.flexdma
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())
    assert AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    about = records(out).about
    assert {name: about["calibration"][name] for name in vars(found)} == vars(found)


def test_records_are_of_text_that_did_not_calibrate(out):
    found = records(out)
    assert {name: one["keys"] for name, one in found.about["contenders"].items()} == {
        FULL: None, WINDOW: 64, "calibrated": 64,
    }  # fmt: skip
    assert found.about["texts"].keys() == {"one.txt, last quarter", "two <b>.txt"}
    rest = torch.tensor(byte_tokenizer()(LONG[LONG.index("\n", len(LONG) * 3 // 4) + 1 :])["input_ids"])[None, :600]
    for name, model in ((FULL, tiny_model()), ("calibrated", from_pretrained(out))):
        with torch.no_grad():
            likelihood = model(rest).logits[0, :-1].log_softmax(-1).gather(1, rest[0, 1:, None])
        (value,) = [record.value for record in found.records if record.contender == name
                    and record.shape == "one.txt, last quarter, stretch 0, tokens 64 to 599"]  # fmt: skip
        assert value == pytest.approx(-likelihood[63:].mean().item(), rel=1e-4)


def test_the_report_shows_what_heads_keep(out):
    page = (out / "retrofit" / "index.html").read_text()
    assert page.count("data:image/svg+xml") == 6  # three pictures, light and dark
    assert "two &lt;b&gt;.txt" in page
    assert "<b>" not in page
    assert "tokens of the first three quarters of one.txt; windows of" in page
    assert {"device", "torch", "transformers", "flexdma"} <= records(out).about["machine"].keys()
    assert {path.name for path in (out / "retrofit").iterdir()} == {
        "evaluation.json", "index.html", "tables.md",
        *(f"{name}-{theme}.svg" for name in ("nll", "needles", "heads") for theme in ("light", "dark")),
    }  # fmt: skip


def test_parts_have_all_of_a_text_and_nothing_twice(given, tmp_path):
    found = parts([given / "one.txt"], [])
    (first,), (last,) = found.calibration.values(), found.evaluation.values()
    assert first + last == LONG
    assert first.endswith("\n")
    assert len(first) >= 3 * len(last) - 4 * len("\n".join(TEXT.splitlines()[:1]))
    (tmp_path / "line.txt").write_text("a" * 400)
    assert [len(text) for part in parts([tmp_path / "line.txt"], [])[:2] for text in part.values()] == [300, 100]


# Interruptions


def test_an_interrupted_calibration_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupted(model, batches, **options):
        next(iter(batches))
        raise KeyboardInterrupt

    monkeypatch.setattr("flexdma.integrations.transformers.calibrate", interrupted)
    assert run(tmp_path / "model") == INTERRUPTED
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_save_leaves_the_old_folder(out, run, tmp_path, monkeypatch):
    shutil.copytree(out, tmp_path / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()}

    def interrupted(folder, results):
        assert (folder.parent / "model.safetensors").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "write_records", interrupted)
    assert run(tmp_path / "model", "--overwrite") == INTERRUPTED
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()} == before


def test_an_interrupted_measurement_goes_on(out, run, tmp_path, monkeypatch, capsys):
    answer, nll = Contender.answer, Contender.nll
    calls: list[str] = []

    def counted(of, limit):
        def call(self, given):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(self.name)
            return of(self, given)

        return call

    monkeypatch.setattr(Contender, "nll", counted(nll, 4))
    assert run(tmp_path / "model") == INTERRUPTED
    assert from_pretrained(tmp_path / "model").config.flexdma["calibrated"]
    monkeypatch.setattr(Contender, "nll", counted(nll, None))
    monkeypatch.setattr(Contender, "answer", counted(answer, 8))
    assert run(tmp_path / "model", "--resume") == INTERRUPTED
    assert calls == [FULL, WINDOW, "calibrated"] * 2 + [FULL, WINDOW]  # two texts, and one needle for two
    page = (tmp_path / "model" / "retrofit" / "index.html").read_text()
    assert page.endswith("</html>\n")
    monkeypatch.setattr(Contender, "answer", counted(answer, None))
    monkeypatch.setattr("flexdma.integrations.transformers.calibrate", None)
    capsys.readouterr()
    assert run(tmp_path / "model", "--resume") == 0
    assert len(calls) == 2 * 3 + 4 * 3
    assert "Needles found in 600 tokens" in capsys.readouterr().out

    def measured(folder):
        return sorted(record for record in records(folder).records if record.section != "speed")

    assert measured(tmp_path / "model") == measured(out)
    monkeypatch.setattr(Contender, "prefill", None)
    assert run(tmp_path / "model", "--resume") == 0  # nothing is left to do
    assert len(calls) == 2 * 3 + 4 * 3


def test_a_gguf_file_becomes_a_folder_and_is_measured_later(given, run, tmp_path, capsys):
    gguf = write_gguf(tmp_path / "tiny.gguf", "llama")
    options = [gguf, "--text", given / "one.txt", "--out", tmp_path / "model", *SMALL]
    assert main(["retrofit", *map(str, options), "--no-evaluate"]) == 0
    assert "is a model folder with bounded memory" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "model").iterdir()} == MODEL_FILES
    assert "data:image/svg+xml" in (tmp_path / "model" / "retrofit" / "index.html").read_text()
    assert from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    sizes = ["--resume", "--lengths", "600", "--needles", "0", "--stretches", "1", "--rounds", "0"]
    assert main(["retrofit", *map(str, options), *sizes]) == 0
    assert {record.section for record in records(tmp_path / "model").records} == {"nll"}


def test_a_distilled_model_stands_beside_the_calibrated_one(out, run, tmp_path, monkeypatch, capsys):
    options = ["--distill", "2", "--needles", "0", "--rounds", "0"]
    with monkeypatch.context() as patch:
        patch.setattr("flexdma.integrations.transformers.distill", lambda *given, **options: interrupt())
        assert run(tmp_path / "model", *options) == INTERRUPTED
    made = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert made == (out / "model.safetensors").read_bytes()
    assert run(tmp_path / "model", *options, "--resume") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert {path.name for path in (tmp_path / "model").iterdir()} == MODEL_FILES
    calibrated = tmp_path / "model" / "retrofit" / "calibrated"
    assert {path.name for path in calibrated.iterdir()} == MODEL_FILES - {"retrofit"}
    assert (calibrated / "model.safetensors").read_bytes() == made
    found = records(tmp_path / "model")
    assert list(found.about["contenders"]) == [FULL, WINDOW, "calibrated", "distilled"]
    assert len(found.about["distillation"]["divergence"]) == 2
    assert found.about["distillation"]["ranking"] == []
    assert [record for record in found.records if record.contender != "distilled"] == [
        record for record in records(out).records if record.section == "nll"
    ]
    distilled = from_pretrained(tmp_path / "model")
    assert distilled.config.flexdma["distilled"]
    assert changed_weights(distilled, calibrated) == {
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qkvo"
    }
    rest = torch.tensor(byte_tokenizer()(TEXT[::-1])["input_ids"])[None, :600]
    expected = torch.nn.functional.cross_entropy(distilled(rest).logits[0, :-1], rest[0, 1:], reduction="none")
    (value,) = [record.value for record in found.records if record.contender == "distilled"
                and record.shape == "two <b>.txt, stretch 0, tokens 64 to 599"]  # fmt: skip
    assert value == pytest.approx(expected[63:].mean().item(), rel=1e-4)


def test_distillation_without_adapters_trains_gates_alone(run, tmp_path):
    assert run(tmp_path / "model", "--distill", "2", "--lora", "0", "--no-evaluate") == 0
    assert len(records(tmp_path / "model").about["distillation"]["ranking"]) == 2
    changed = changed_weights(from_pretrained(tmp_path / "model"), tmp_path / "model" / "retrofit" / "calibrated")
    assert changed == {f"model.layers.{layer}.self_attn.value_gate.dt_proj.weight" for layer in (0, 1)}


def changed_weights(model, folder):
    before = from_pretrained(folder).state_dict()
    return {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}


# Refusals


def interrupt():
    raise KeyboardInterrupt


def refused(options, message, capsys):
    assert main(["retrofit", *map(str, options)]) == CANNOT
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_refusals(given, tmp_path, capsys):
    plain, text, out = given / "plain", ["--text", given / "one.txt"], ["--out", tmp_path / "out"]
    save(tmp_path / "converted", convert_to_dma(tiny_model(), 20).eval())
    save(tmp_path / "bloom", tiny_model("Bloom", n_layer=2, n_head=4))
    save(tmp_path / "mistral", tiny_model("Mistral", sliding_window=20))
    write_gguf(tmp_path / "other.gguf", "nonesuch")
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfd")
    capsys.readouterr()  # bars of saving
    for options, message in (
        ([plain, *text], "the following arguments are required: --out"),
        ([tmp_path / "absent", *text, *out], "which does not exist"),
        ([tmp_path / "other.gguf", *text, *out], "nonesuch"),
        ([tmp_path / "bloom", *text, *out], "bloom cannot be converted (docs/transformers.md has the families): model: exp"),
        ([tmp_path / "converted", *text, *out], "converted cannot be converted (docs/transformers.md has"),
        ([tmp_path / "mistral", *text, *out], "own sliding window of 20, less recent=15, got 46"),
        ([plain, "--text", tmp_path / "short.txt", *out], "--text: expected at least 600 tokens, as many as the longest"),
        ([plain, "--text", tmp_path / "short.txt", *out, "--no-evaluate"], "in the first three quarters of short.txt"),
        ([plain, *text, "--evaluation-text", tmp_path / "short.txt", *out], "--evaluation-text: expected at least 600"),
        ([plain, *text, "--evaluation-text", tmp_path / "bytes.txt", *out], "--evaluation-text: expected UTF-8"),
        ([plain, *text, "--evaluation-text", given / "one.txt", *out], "--evaluation-text: expected texts other than"),
        ([plain, *text, *out, "--sequence", "60"], "--sequence: expected enough tokens for 1 facts"),
        ([plain, *text, *out, "--far", "500"], "--tokens: expected sequences of at least 3 far = 1500 tokens, got 1300"),
        ([plain, *text, *out, "--lora", "4"], "--lora: expected --distill beside it, got 4"),
        ([plain, *text, *out, "--recent", "61"], "--recent: expected less than --budget, which is 61, got 61"),
        ([plain, *text, *out, "--lengths", "64"], "--lengths: expected one of more than 64 tokens"),
        ([plain, *text, *out, "--lengths", "300"], "--lengths: expected at least"),
        ([plain, *text, "--out", given], "--out: expected an empty folder or none, got"),
        ([plain, *text, "--out", given, "--overwrite"], "--overwrite: expected a folder that retrofit wrote, got"),
        ([plain, *text, "--out", given, "--resume"], "--resume: expected a folder that retrofit wrote, got"),
        ([plain, *text, "--out", "."], "--out: expected a folder that can be renamed, got ."),
        ([plain, *text, *out, "--resume", "--overwrite"], "not allowed with argument"),
    ):  # fmt: skip
        refused([options[0], *SIZES, *options[1:]], message, capsys)
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_only_as_it_began(out, run, given, tmp_path, capsys):
    for options, message in (
        ([], f"--out: expected an empty folder or none, got {out}; --resume goes on from it, --overwrite replaces it"),
        (["--resume", "--budget", "60"], f"--budget: expected 61, as in {out}, which --resume goes on from, got 60"),
        (["--resume", "--needles", "2"], f"--needles: expected 1, as in {out}, which --resume goes on from, got 2"),
        (["--resume", "--text", str(given / "two <b>.txt")], "--evaluation-text: expected texts other than those of"),
        (["--resume", "--dtype", "bfloat16"], "--dtype: expected float32, as in"),
    ):
        assert run(out, *options) == CANNOT
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
    assert json.loads((out / "retrofit" / "evaluation.json").read_text())["plan"]["needles"] == 1


@pytest.mark.network
@pytest.mark.slow
def test_a_real_model(tmp_path):
    """What SmolLM2-135M finds with full attention, its calibrated gates keep; sinks and a window do not."""
    model = str(download_smollm2(tmp_path))
    assert main(["retrofit", model, "--quick", "--kinds", "pass key", "keys", "--out", str(tmp_path / "out")]) == 0
    summary: Any = Summary(records(tmp_path / "out"))
    assert summary.needles(WINDOW).exact < summary.needles("calibrated").exact <= summary.needles(FULL).exact
    assert summary.gap_closed("calibrated") > 0.3
