"""Models by name: what is loaded is the model that was saved, and what cannot be loaded is one line."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config

from flexdma.integrations.transformers import convert_to_dma
from flexdma.tools.language_models import full_attention, load_language_model
from flexdma.tools.refusal import RefusedError
from tests.tools.tiny_models import SIZES, TEXT, byte_tokenizer, save, tiny_model, write_gguf

IDS = torch.tensor(byte_tokenizer()(TEXT)["input_ids"])[None, :90]


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_a_plain_folder(tmp_path):
    loaded = load_language_model(str(save(tmp_path, tiny_model())))
    assert loaded.choice is None
    assert torch.equal(logits(loaded.model), logits(tiny_model()))
    assert loaded.tokenizer(TEXT)["input_ids"] == byte_tokenizer()(TEXT)["input_ids"]
    assert full_attention(loaded.model) is loaded.model


def test_a_converted_folder_has_its_gates_and_the_weights_of_full_attention(tmp_path):
    converted = convert_to_dma(tiny_model(tie_word_embeddings=True), 20, sinks=2).eval()
    for layer in converted.model.layers:
        torch.nn.init.normal_(layer.self_attn.value_gate.A)
    loaded = load_language_model(str(save(tmp_path, converted)))
    assert loaded.choice is not None
    assert loaded.choice["window_size"] == 20
    assert torch.equal(logits(loaded.model), logits(converted))
    plain = full_attention(loaded.model)
    torch.testing.assert_close(logits(plain), logits(tiny_model(tie_word_embeddings=True)))
    assert not torch.allclose(logits(plain), logits(converted))
    shared = {weight.data_ptr() for weight in loaded.model.parameters()}
    assert all(weight.data_ptr() in shared for weight in plain.parameters())
    assert torch.equal(logits(loaded.model), logits(converted))  # the plain one has not changed it


@pytest.mark.parametrize("converted", [False, True])
def test_weights_that_are_missing_are_not_drawn_at_random(converted, tmp_path):
    model = tiny_model()
    folder = save(tmp_path, convert_to_dma(model, 20) if converted else model)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.v_proj.weight"], weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RefusedError, match=r"MODEL: cannot load .*: it has no lm_head.weight and 1 more weights"):
        load_language_model(str(folder))


def test_a_tokenizer_of_another_model_is_named(tmp_path):
    with pytest.raises(
        RefusedError, match=r"MODEL: expected a tokenizer of at most 100 ids, as .* has embeddings, got 257"
    ):
        load_language_model(str(save(tmp_path, tiny_model(vocab_size=100, bos_token_id=1, eos_token_id=1))))


def test_a_gguf_file_that_ends_early_is_named(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "llama")
    path.write_bytes(path.read_bytes()[:70])
    with pytest.raises(RefusedError, match=r"MODEL: cannot load .*tiny.gguf: "):
        load_language_model(str(path))


def test_a_gguf_file_is_an_ordinary_model(tmp_path):
    loaded = load_language_model(str(write_gguf(tmp_path / "tiny.gguf", "llama")))
    torch.testing.assert_close(logits(loaded.model), logits(tiny_model()))
    assert loaded.tokenizer(TEXT)["input_ids"] == byte_tokenizer()(TEXT)["input_ids"]
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_language_model(str(tmp_path / "saved"))
    assert torch.equal(logits(again.model), logits(loaded.model))


def test_what_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("no model")
    (tmp_path / "broken.gguf").write_bytes(b"no model")
    write_gguf(tmp_path / "other.gguf", "nonesuch")
    encoder = tmp_path / "encoder"
    T5Config(vocab_size=SIZES["vocab_size"]).save_pretrained(encoder)
    byte_tokenizer().save_pretrained(encoder)
    for name, message in {
        "empty": "has no config.json",
        "text.txt": "expected a hub name, a model folder or a .gguf file, got the file",
        "absent": "which does not exist",
        "absent.gguf": "which does not exist",
        "broken.gguf": "cannot load .*broken.gguf: ",
        "other.gguf": "cannot load .*other.gguf: .*nonesuch",
        "encoder": "cannot load .*encoder: .*T5Config",
    }.items():
        with pytest.raises(RefusedError, match=message) as refused:
            load_language_model(str(tmp_path / name))
        assert str(refused.value).startswith("MODEL: ")
        assert "\n" not in str(refused.value)
    with pytest.raises(RefusedError, match="MODEL: cannot load nobody/absent: "):
        load_language_model("nobody/absent")
