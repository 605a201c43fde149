"""`python -m flexdma view --model`: the page has the lifespans and gates of the model and the attention of the full one."""

from typing import Any

import pytest
import torch
import transformers

from flexdma.integrations.transformers import convert_to_dma
from flexdma.reference import dense_visibility
from flexdma.tools.byte_models.labels import byte_labels
from flexdma.tools.language_models import full_attention, load_language_model
from flexdma.tools.view.converted import shown_model
from flexdma.tools.view.labels import labels_of_tokens
from tests.integrations.hf_models import causal_lm, distinct_tokens
from tests.tools.converted_cases import RECENT, SINKS, WINDOWS, choose_keys, make_converted
from tests.tools.tiny_models import byte_tokenizer, save, tiny_model
from tests.tools.view_cases import HOSTILE, data_of, numbers, refused, view, visible

TEXT = HOSTILE + " and then the rest of it." * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_converted(tmp_path_factory.mktemp("converted") / "tiny-dma")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def page(folder, text, tmp_path):
    out = tmp_path / "page.html"
    assert view(text, folder, out, source="--model") == 0
    return out


@torch.no_grad()
def dense_attention(plain, ids):
    """The attention [Hq, N, N] of each layer, by transformers' eager implementation."""
    plain.set_attn_implementation("eager")
    return [weights[0] for weights in plain(ids, output_attentions=True).attentions]


def grouped(weights, kv_heads):
    return weights.unflatten(0, (kv_heads, -1)).mean(1)


def agrees(keys, probabilities, dense):
    """Whether keys and probabilities [N, k] are the largest of each row of `dense` [N, N]; equal ones in any order."""
    largest = dense.topk(keys.shape[-1], -1).values
    torch.testing.assert_close(dense.gather(-1, keys.long()), largest, atol=2e-5, rtol=0)
    torch.testing.assert_close(probabilities, largest, atol=2e-5, rtol=0)
    return True


def test_the_tokens_are_those_of_the_tokenizer(page):
    data = data_of(page)
    assert data["tokens"] == byte_labels(TEXT.encode())  # one token per byte
    assert data["continuations"] == [j for j, byte in enumerate(TEXT.encode()) if byte & 0xC0 == 0x80]
    assert (data["unit"], data["start"], data["shown"], data["total"]) == ("tokens", 0, *[len(TEXT.encode())] * 2)
    assert [data["tokens"][key] for key in data["lineEnds"]] == ["↵"]


def test_tokens_of_several_characters_have_labels_of_one_line():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a\n")["input_ids"]
    tokenizer.add_tokens(["\n\n  ", "e\u0301"])
    more = [*ids, *tokenizer("\n\n  e\u0301")["input_ids"], tokenizer.bos_token_id]
    labels = labels_of_tokens(tokenizer, more)
    assert labels.tokens == ["a", "↵", "↵↵  ", "e\u0301", "<end>"]
    assert labels.line_ends == [1, 2]
    cut = tokenizer("é漢")["input_ids"][:4]  # the last character is not whole
    assert labels_of_tokens(tokenizer, cut).tokens == ["é", "·", "\ufffd", "·"]


def test_a_tokenizer_that_drops_the_first_space_of_a_text_has_all_others():
    class Dropping:
        pieces = (" The", " ", " clerk", "s", "", " wrote")

        def decode(self, ids, **options):
            return "".join(self.pieces[token] for token in ids).removeprefix(" ")

    labels = labels_of_tokens(Dropping(), range(6))
    assert labels == (["The", " ", " clerk", "s", "⟨⟩", " wrote"], [], [])


@torch.no_grad()
def test_the_lifespans_are_the_dense_mask_of_the_gates(page, folder):
    data = data_of(page)
    model = load_language_model(str(folder)).model
    ids = torch.tensor([byte_tokenizer()(TEXT)["input_ids"]])
    hidden = model(ids, output_hidden_states=True).hidden_states
    for number, (layer, before) in enumerate(zip(model.model.layers, hidden, strict=False)):
        attention = layer.self_attn
        value = attention.v_proj(layer.input_layernorm(before)).unflatten(-1, (2, -1)).transpose(1, 2)
        gate = attention.value_gate(value)
        for head, window in enumerate(WINDOWS[number]):
            shown, recent = data["models"][0]["layers"][number][head], RECENT[number]
            torch.testing.assert_close(numbers("f", shown["gate"]), gate[0, head])
            dense = dense_visibility(gate[:, [head]], window_size=window, sinks=SINKS, recent=recent)[0, 0]
            assert torch.equal(visible(data, shown), dense)
            assert shown["capacity"] == window + SINKS + recent


def test_beside_them_is_the_attention_of_the_full_model(page, folder):
    data = data_of(page)
    ids = torch.tensor([byte_tokenizer()(TEXT)["input_ids"]])
    for number, weights in enumerate(dense_attention(tiny_model(), ids)):
        for head, dense in enumerate(grouped(weights, 2)):
            shown = data["models"][0]["layers"][number][head]
            keys, probabilities, on_kept = (
                numbers("H", shown["attended"][name]) for name in ("keys", "probabilities", "onKept")
            )
            rows = (len(dense), -1)
            assert agrees(keys.view(rows), probabilities.view(rows) / data["steps"], dense)
            kept = visible(data, shown)
            on_kept_dense = (dense * kept).sum(-1)
            torch.testing.assert_close(on_kept / data["steps"], on_kept_dense, atol=2e-5, rtol=0)
            lacking = kept.sum(-1) < torch.arange(1, len(dense) + 1)
            assert shown["attended"]["mean"] == pytest.approx(on_kept_dense[lacking].mean().item(), abs=1e-4)


@pytest.mark.parametrize("family", ["Mistral", "Gemma2", "GptOss", "Falcon"])
def test_windows_softcaps_sinks_and_layers_without_an_interface(family):
    # The recency is not among the gates that are shown, as it ranks no keys.
    recency: dict[str, Any] = {"recency": "forget", "recency_ranks": False} if family == "Gemma2" else {}
    sizes = {"multi_query": False} if family == "Falcon" else {}
    ids = distinct_tokens(1, 40)
    converted = choose_keys(convert_to_dma(causal_lm(family, **sizes), 4, **recency))
    shown = shown_model(converted, ids, "label", lambda: None)
    if recency:
        gate: Any = converted.model.layers[0].self_attn.value_gate
        values = []
        hook = gate.register_forward_pre_hook(lambda gate, arguments: values.append(arguments[0]))
        converted(ids, use_cache=False)
        hook.remove()
        torch.testing.assert_close(shown.layers[0].gate, gate(values[0], return_recency=True)[0])
    plain = causal_lm(family, **sizes)
    for layer, weights in zip(shown.layers, dense_attention(plain, ids), strict=True):
        assert layer.attended is not None
        dense = grouped(weights, layer.gate.shape[1])
        assert agrees(layer.attended.keys, layer.attended.probabilities, dense)
        kept = torch.tensor([[j <= i for j in range(40)] for i in range(40)])
        kept = kept & (torch.arange(40)[:, None] < layer.lifespans.death[0, :, None])
        torch.testing.assert_close(layer.attended.on_kept, (dense * kept).sum(-1) / dense.sum(-1))


def test_the_full_model_runs_with_its_own_weights_and_attention(folder):
    model = load_language_model(str(folder)).model
    ids = torch.tensor([byte_tokenizer()(TEXT)["input_ids"]])
    ticks = []
    before = model(ids).logits
    shown_model(model, ids, "label", lambda: ticks.append(1))
    assert len(ticks) == 2 * len(WINDOWS)
    assert torch.equal(model(ids).logits, before)
    assert not torch.allclose(full_attention(model)(ids).logits, before)


def test_a_part_of_a_long_text_is_shown_and_said(folder, text, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert view(text, folder, out, "--start", "3", "--tokens", "30", source="--model") == 0
    assert f"tokens 3 to 32 of {len(TEXT.encode()):,}" in capsys.readouterr().out
    assert data_of(out)["tokens"] == byte_labels(TEXT.encode()[3:33])


def test_the_first_tokens_of_a_tokenizer_come_first(folder, text, tmp_path, monkeypatch):
    adding = transformers.PreTrainedTokenizerFast.__call__

    def with_first(self, content, add_special_tokens=True, **options):
        made = adding(self, content, add_special_tokens=False, **options)
        made["input_ids"] = [self.bos_token_id] * add_special_tokens + made["input_ids"]
        return made

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "__call__", with_first)
    out = tmp_path / "page.html"
    assert view(text, folder, out, "--start", "3", "--tokens", "30", source="--model") == 0
    assert data_of(out)["tokens"] == ["<end>", *byte_labels(TEXT.encode()[3:33])]


def test_requests_that_cannot_be_met_are_one_line_exit_code_2_and_nothing_written(
    folder, text, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "page.html"

    def asked(model, content, *options):
        return view(content, model, out, *options, source="--model")

    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff")
    plain = save(tmp_path / "plain", tiny_model())
    convert_to_dma(tiny_model(), 4).save_pretrained(tmp_path / "no-tokenizer")
    broken = choose_keys(convert_to_dma(tiny_model(), 4))
    torch.nn.init.constant_(broken.model.layers[1].self_attn.q_proj.weight, float("nan"))
    save(tmp_path / "broken", broken)
    save(tmp_path / "endless", convert_to_dma(tiny_model(), None, selection="threshold"))
    made = {path.name for path in tmp_path.iterdir()}
    capsys.readouterr()  # bars of saving
    refused(capsys, asked(plain, text), "expected a converted model (python -m flexdma retrofit or convert_to_dma")
    refused(capsys, asked(tmp_path / "absent", text), "without a config.json")
    refused(capsys, asked(tmp_path / "no-tokenizer", text), "--model: expected a tokenizer beside the model")
    refused(capsys, asked(tmp_path / "broken", text), "--model: expected finite attention of the full model")
    refused(capsys, asked(tmp_path / "endless", text), "expected layers with windows, got selection='threshold'")
    refused(capsys, asked(folder, tmp_path / "empty.txt"), "--text: expected at least one token")
    refused(capsys, asked(folder, tmp_path / "binary.txt"), "--text: expected UTF-8")
    refused(capsys, asked(folder, text, "--start", "9999"), "--start")
    refused(capsys, asked(folder, text, "--tokens", "4"), "--tokens: expected more tokens than the smallest window, 4")
    refused(capsys, asked(folder, text, "--tokens", "99999"), "--tokens")
    refused(capsys, asked(folder, text, "--checkpoint", str(plain)), "--checkpoint: not allowed with")
    monkeypatch.setattr("flexdma.tools.view.command.LARGEST", 10_000)
    refused(capsys, asked(folder, text), "--tokens: expected at most 26 for 4 KV heads")
    assert {path.name for path in tmp_path.iterdir()} == made
