"""The demonstration, uncompiled and tiny: its files, its refusals, and that its figures are right."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from flexdma import Lifespans
from flexdma.__main__ import main
from flexdma.atomic_write import atomic_write
from flexdma.plots import tile_maps
from flexdma.plots.blocks import FULL, PARTIAL, SKIPPED
from flexdma.reference import dense_visibility
from flexdma.tools.byte_models.attentions import KINDS, make_attention
from flexdma.tools.byte_models.checkpoint import load_checkpoint
from flexdma.tools.byte_models.model import ByteModel, ModelSizes, recorded_gates, rotary_embedding
from flexdma.tools.byte_models.text import TextError, load_text, training_windows, validation_windows
from flexdma.tools.demo import comparison
from flexdma.tools.demo.masks import layer_lifespans, visible_keys_per_query
from flexdma.tools.demo.sampling import sample
from flexdma.tools.demo.training import Hyperparameters, train

TINY = ModelSizes(width=32, layers=2, heads=4, kv_heads=2, window=4)
PICTURES = ("masks", "blocks", "lifespans", "lifetimes", "gates", "sparsity", "losses")
REPORT = {*(f"{name}.png" for name in PICTURES), "results.json", "checkpoint"}


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(b"%d times %d is %d.\n" % (a, b, a * b) for a in range(12) for b in range(12)))
    return path


def run_demo(text: Path, out: Path, *options: str) -> int:
    small = ["--no-compile", "--steps", "2", "--context", "32", "--window", "8"]
    return main(["demo", "--quick", *small, "--text", str(text), "--out", str(out), *options])


def tiny_model(kind: str, recency: str = "slope", seed: int = 0) -> ByteModel:
    return ByteModel(kind, TINY, recency=recency, seed=seed)


def deterministic(results: Path) -> dict:
    content = json.loads(results.read_text())
    return {
        "sample": content["sample"],
        "tiles": content["tiles_visited"],
        "models": {
            kind: (model["validation_bits_per_byte"], model["visible_keys_per_query"], model["training_bits_per_byte"])
            for kind, model in content["models"].items()
        },
    }


@pytest.mark.parametrize(("kind", "recency"), [("dma", "slope"), ("dma-recency", "slope"), ("dma-recency", "forget")])
def test_the_bounded_state_gives_the_logits_of_one_pass(kind, recency):
    model = tiny_model(kind, recency).eval()
    for attention in model.attentions():
        torch.nn.init.normal_(attention.gate.A)
    tokens = torch.randint(256, (2, 40))
    with torch.no_grad():
        whole, states = model(tokens), model.empty_states(2)
        logits: list[torch.Tensor] = []
        for size in (17, 1, 1, 20, 1):
            read = sum(part.shape[1] for part in logits)
            part, states = model.following(tokens[:, read : read + size], states)
            logits.append(part)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-5)


def test_a_sample_remembers_the_same_however_long_it_is():
    model = tiny_model("dma-recency").eval()
    prompt = torch.randint(256, (12,))
    short, long = (sample(model, prompt, length, seed=0) for length in (3, 30))
    assert long.continuation.startswith(short.continuation[:2])
    assert short.state_bytes == long.state_bytes
    assert long.full_cache_bytes == 2 * TINY.layers * TINY.kv_heads * (TINY.width // TINY.heads) * 4 * 42


def test_a_run_writes_the_whole_report_and_the_same_seed_writes_the_same_numbers(text_file, tmp_path, capsys):
    outs = [tmp_path / "first", tmp_path / "second"]
    for out in outs:
        assert run_demo(text_file, out) == 0
        assert {path.name for path in out.iterdir()} == REPORT
    first, second = (deterministic(out / "results.json") for out in outs)
    assert first == second
    assert set(first["models"]) == set(KINDS)
    assert all(0 < bits < 9 and len(losses) == 2 for bits, _, losses in first["models"].values())
    printed = capsys.readouterr().out
    assert "bits per byte" in printed
    assert "window + slope" in printed
    results = json.loads((outs[0] / "results.json").read_text())
    assert results["arguments"]["steps"] == 2
    trained = load_checkpoint(outs[0] / "checkpoint")
    assert [trained[kind].label for kind in KINDS] == [model["label"] for model in results["models"].values()]
    assert results["models"]["full"]["recorded_steps"] == []
    for kind in ("dma", "dma-recency"):
        model = trained[kind].model
        assert results["models"][kind]["recorded_steps"] == [1, 2]
        # Recorded on the first validation window; the last time after the last step.
        windows = validation_windows(load_text(str(text_file), 32), 32, 64)[:1]
        shares = [(a.death <= a.birth).float().mean((0, 2)).tolist() for a in layer_lifespans(model, windows[:, :-1])]
        assert results["models"][kind]["never_visible"][-1] == shares


@pytest.mark.parametrize("recency", ["slope", "forget"])
def test_training_lowers_the_loss_with_either_recency(recency, text_file):
    text, hyperparameters = load_text(str(text_file), 32), Hyperparameters(steps=8, context=32, warmup=1)
    course = train(tiny_model("dma-recency", recency), text, hyperparameters, compiled=False)
    assert course.losses[-1] < course.losses[0]
    assert course.tokens_per_second > 0


@pytest.mark.parametrize(
    ("content", "says"), [(None, "No such file"), (b"", "got 0"), (b"too short" * 20, "expected at least 640 bytes")]
)
def test_text_that_cannot_be_used_is_one_line_exit_code_2_and_nothing_written(content, says, tmp_path, capsys):
    text, out = tmp_path / "text", tmp_path / "out"
    if content is not None:
        text.write_bytes(content)
    assert run_demo(text, out) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    assert "--text" in error
    assert not out.exists()


def test_a_device_that_is_not_there_is_one_line_and_exit_code_2(text_file, tmp_path, capsys):
    for device in ("cuda:77", "nonsense"):
        assert run_demo(text_file, tmp_path / "out", "--device", device) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "--device" in error
    assert not (tmp_path / "out").exists()


def test_an_out_folder_that_is_a_file_is_refused_before_training(text_file, capsys):
    assert run_demo(text_file, text_file) == 2
    assert "--out" in capsys.readouterr().err


def test_a_missing_extra_is_named(text_file, tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert run_demo(text_file, tmp_path / "out") == 2
    assert "pip install flexdma[demo]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_interruption_leaves_whole_files_or_none(text_file, tmp_path, capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "train", interrupted)
    assert run_demo(text_file, tmp_path / "out") == 130
    assert capsys.readouterr().err.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == []

    path = tmp_path / "kept.json"
    path.write_text("old")

    def half(part: Path) -> None:
        part.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, half)
    assert path.read_text() == "old"
    assert sorted(tmp_path.glob(".*")) == []


def test_training_and_validation_text_do_not_overlap(text_file):
    text = load_text(str(text_file), 32)
    assert torch.cat([text.training, text.validation]).tolist() == list(text_file.read_bytes())
    windows = validation_windows(text, 32, 5)
    assert windows.shape == (5, 33)
    assert windows[-1].tolist() == text.validation[-33:].tolist()
    assert training_windows(text, 32, 3, torch.Generator()).shape == (3, 33)
    with pytest.raises(TextError):
        load_text(str(text_file), 10_000)


def test_models_of_one_seed_start_alike_wherever_they_agree():
    models = {kind: dict(tiny_model(kind).named_parameters()) for kind in KINDS}
    forget = dict(tiny_model("dma-recency", "forget").named_parameters())
    other = dict(tiny_model("dma", seed=1).named_parameters())
    for parameters in (*models.values(), forget):
        for name in set(parameters) & set(models["full"]):
            assert torch.equal(parameters[name], models["full"][name]), name
    assert torch.equal(
        forget["blocks.1.attention.gate.dt_proj.weight"], models["dma"]["blocks.1.attention.gate.dt_proj.weight"]
    )
    assert not torch.equal(other["head.weight"], models["dma"]["head.weight"])


@pytest.mark.parametrize("kind", ["full", "window"])
def test_the_baselines_are_plain_attention_under_their_mask(kind):
    torch.manual_seed(0)
    layer = make_attention(kind, 32, 4, 2, 4, recency="slope", slopes=[0.3, 0.03])
    hidden = torch.randn(2, 19, 32)
    embeddings = rotary_embedding(19, 8, hidden.device)
    query, key, value = layer.project(hidden, embeddings)
    distance = torch.arange(19)[:, None] - torch.arange(19)
    visible = (distance >= 0) & (distance < (4 if kind == "window" else 19))
    bias = -layer.gate.slope.repeat_interleave(2)[:, None, None] * distance
    plain = scaled_dot_product_attention(
        query, key, value, attn_mask=bias.masked_fill(~visible, -math.inf)[None], enable_gqa=True
    )
    expected = layer.o_proj(plain.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(hidden, embeddings), expected, atol=1e-5, rtol=1e-4)
    (slope_gradient,) = torch.autograd.grad(layer(hidden, embeddings).square().sum(), layer.gate.slope)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), layer.gate.slope)
    torch.testing.assert_close(slope_gradient, expected_gradient, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_visible_keys_are_counted_as_in_the_dense_mask(kind):
    model = tiny_model(kind)
    with torch.no_grad():
        for attention in model.attentions():
            if kind.startswith("dma"):
                attention.gate.A.normal_()
    windows = torch.randint(256, (3, 18), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), recorded_gates(model) as gates:
        model(windows[:, :-1])
    if kind == "full":
        counts = [torch.ones(17, 17).tril().sum(-1) for _ in gates]
    elif kind == "window":
        counts = [torch.ones(17, 17).tril().triu(-TINY.window + 1).sum(-1) for _ in gates]
    else:
        counts = [dense_visibility(gate, window_size=TINY.window).float().sum(-1) for gate in gates]
    expected = torch.stack([count.mean() for count in counts]).mean().item()
    assert visible_keys_per_query(model, windows) == pytest.approx(expected)


def test_tile_maps_are_those_of_the_dense_mask():
    model = tiny_model("dma")
    with torch.no_grad():
        for attention in model.attentions():
            attention.gate.A.fill_(2.0)
    tokens = torch.randint(256, (1, 64), generator=torch.Generator().manual_seed(0))
    birth, death = (t[0, 0] for t in layer_lifespans(model, tokens)[1])
    maps = tile_maps(Lifespans(birth, death), TINY.window, 8)
    query = torch.arange(64)[:, None]
    counts = ((query >= birth) & (query < death)).view(8, 8, 8, 8).sum((1, 3))
    expected = torch.where(counts == 0, SKIPPED, torch.where(counts == 64, FULL, PARTIAL))
    assert torch.equal(maps.natural, expected)
    assert int((maps.packed != SKIPPED).sum()) <= int((expected != SKIPPED).sum())


def test_top_level_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert "demo" in capsys.readouterr().out
    assert main(["demo", "--steps", "0"]) == 2
    assert "--steps: expected at least 1, got 0" in capsys.readouterr().err
