"""Windows per layer and per head, recent tokens per layer: against the dense specification in every layer."""

import json
import re

import pytest
import torch

from flexdma.reference import dense_dynamic_mask_attention
from tests.integrations.hf_models import CACHE, assert_close, causal_lm, distinct_tokens, doge, padding

import transformers  # isort: skip  # after hf_models, which keeps it offline
from flexdma.integrations.transformers import (  # isort: skip
    DynamicMaskCache, convert_to_dma, from_pretrained, set_window_size, use_flexdma
)  # fmt: skip

# Of three layers with two KV heads.
WINDOWS, RECENT, SINKS = (5, (2, 9), [1, 3]), [0, 3, 2], 1
SLOTS = [5 + 0 + 1, 9 + 3 + 1, 3 + 2 + 1]
GREEDY = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10, "no_repeat_ngram_size": 1}
# Recencies that are added to logits and rank no keys.
ADDED = [{"recency": recency, "recency_ranks": False} for recency in ("slope", "forget")]


def ranks(options):
    return options.get("recency_ranks", True)


def converted(windows=WINDOWS, recent=RECENT, layers=3, **options):
    """A model whose gates differ, with slopes of about 0.1 per token."""
    model = convert_to_dma(causal_lm("Llama", num_hidden_layers=layers), windows, recent=recent, sinks=SINKS, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("value_gate.A"):
            torch.nn.init.normal_(parameter)
        if name.endswith("value_gate.slope"):
            torch.nn.init.uniform_(parameter, 0.05, 0.2)
    return model


def dense(windows, recent, ranks):
    """The attention interface by the specification, for models without a cache."""

    def attend(module, query, key, value, mask, scaling=None, dropout=0.0, **_):
        real = None if mask is None else mask[:, 0, 0].bool()
        if ranks:
            gate, bias = module.value_gate(value, key_padding_mask=real), None
        else:
            gate, bias = module.value_gate(value, key_padding_mask=real, return_recency=True)
        output = dense_dynamic_mask_attention(
            query, key, value, gate, bias=bias, window_size=windows[module.layer_idx], recent=recent[module.layer_idx],
            sinks=SINKS, scale=scaling, key_padding_mask=real,
        )  # fmt: skip
        return output.transpose(1, 2), None

    return attend


@pytest.fixture
def specified(monkeypatch):
    """Calls a function with attention by the specification."""

    def call(function, *arguments, windows=WINDOWS, recent=RECENT, ranks=True, **named):
        with monkeypatch.context() as patch:
            patch.setitem(transformers.AttentionInterface._global_mapping, "flexdma", dense(windows, recent, ranks))
            return function(*arguments, use_cache=False, **named)

    return call


@pytest.mark.parametrize("options", [{"recency": "slope"}, *ADDED])
def test_each_head_of_each_layer_has_its_window(options, specified):
    model, ids = converted(**options), distinct_tokens(2, 24)
    mask = padding("left", ids)
    want = specified(model, ids, attention_mask=mask, labels=ids, ranks=ranks(options))
    got = model(ids, attention_mask=mask, labels=ids)
    assert_close(got.logits[mask.bool()], want.logits[mask.bool()])
    gradients = [torch.autograd.grad(output.loss, list(model.parameters())) for output in (got, want)]
    for left, right in zip(*gradients, strict=True):
        assert_close(left, right)
    other = specified(model, ids, windows=[5, 9, 3], ranks=ranks(options)).logits
    assert (other - got.logits).abs().max() > 0.1


@pytest.mark.parametrize("options", [{}, {"recency": "forget"}, *ADDED])
def test_generation_keeps_the_widest_window_of_each_layer(options, specified):
    model, ids = converted(**options), distinct_tokens(2, 16)
    mask = padding("left", ids)
    want = specified(model.generate, ids, attention_mask=mask, ranks=ranks(options), **GREEDY)
    got = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(got.sequences, want)
    assert [layer.keys.shape[2] for layer in got[CACHE].layers] == SLOTS
    for options in ({"prefill_chunk_size": 5}, {"cache_implementation": "dynamic"}):
        assert torch.equal(model.generate(ids, attention_mask=mask, **options, **GREEDY), want)


def test_beams_and_an_assistant_find_the_same(specified):
    model, ids = converted(), distinct_tokens(1, 16)
    want = specified(model.generate, ids, num_beams=3, **GREEDY)
    assert torch.equal(model.generate(ids, num_beams=3, **GREEDY), want)
    assistant = converted()
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter += 0.2 * torch.randn_like(parameter)  # so that most of its proposals are rejected
    want = specified(model.generate, ids, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), want)


@pytest.mark.parametrize("options", [{}, *ADDED])
@torch.no_grad()
def test_a_rollback_is_exact(options, specified):
    model, ids, cache = converted(**options), distinct_tokens(1, 24), DynamicMaskCache()
    cache.activate_past_recording()
    for part in ids.split([16, 6, 1, 1], 1):
        model(part, **{CACHE: cache})
    cache.crop(-5)
    got = model(ids[:, -5:], **{CACHE: cache}).logits
    assert_close(got, specified(model, ids, ranks=ranks(options)).logits[:, -5:])


# transformers 5.23 renamed the method, 5.17 has only this one.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_checkpointing_and_one_graph_change_nothing(specified):
    model, ids = converted(WINDOWS[1:], RECENT[1:], layers=2, **ADDED[0]), distinct_tokens(2, 24)
    want = specified(model, ids, labels=ids, windows=WINDOWS[1:], recent=RECENT[1:], ranks=False)
    cache, compiled = DynamicMaskCache(), torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        first, *later = ids.split([21, 1, 1, 1], 1)
        parts = [model(first, **{CACHE: cache}).logits]
        parts += [compiled(token, **{CACHE: cache}).logits for token in later]
    assert_close(torch.cat(parts, 1), want.logits)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad(loss, parameters) for loss in (model(ids, labels=ids).loss, want.loss))
    for left, right in zip(*gradients, strict=True):
        assert_close(left, right)


@pytest.mark.parametrize("options", [{}, ADDED[0]])
def test_a_saved_model_has_the_same_windows(options, tmp_path, specified):
    windows = (*range(2, 12), (3, 20), 4)
    recent = tuple(number % 3 for number in range(12))
    model, ids = converted(windows, recent, layers=12, **options), distinct_tokens(1, 24)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    # config.json has lists, and its names of layers are sorted as text: layer 10 before layer 2.
    saved = json.loads((tmp_path / "config.json").read_text())["flexdma"]
    assert again.config.flexdma == model.config.flexdma == saved
    assert saved["window_size"] == [*range(2, 12), [3, 20], 4]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        assert_close(
            again(ids).logits, specified(model, ids, windows=windows, recent=recent, ranks=ranks(options)).logits
        )


def test_the_sliding_window_of_each_layer_bounds_its_own():
    def gemma():  # a layer with a window of 6, then one without
        return causal_lm("Gemma2")

    convert_to_dma(gemma(), [[2, 6], [7, 50]], recent=[0, 9])
    convert_to_dma(gemma(), [[2, 4], 7], recent=2)
    with pytest.raises(
        ValueError, match=re.escape("window_size[0]: expected at most the model's own sliding window of 6")
    ):
        convert_to_dma(gemma(), [[2, 7], 4])
    with pytest.raises(ValueError, match="the model's own sliding window of 6, less recent=2, got 5"):
        convert_to_dma(gemma(), [[2, 5], 4], recent=2)
    with pytest.raises(ValueError, match=r"^recent: expected less than the model's own sliding window of 6, got 6"):
        convert_to_dma(gemma(), 4, recent=6)


@pytest.mark.parametrize(
    ("windows", "recent", "error", "message"),
    [
        ([4, 4, 4], 0, ValueError, "window_size: expected an int or one item per attention layer = 2, got 3 items"),
        ([4, [4, 4, 4]], 0, ValueError, "window_size[1]: expected one int per key/value head = 2, got 3"),
        ([4, [4, 0]], 0, ValueError, "window_size[1]: expected at least 1, got 0"),
        ([4, None], 0, TypeError, "window_size[1]: expected an int or one int per key/value head, got None"),
        (4, [1], ValueError, "recent: expected an int or one item per attention layer = 2, got 1 items"),
        (4, [1, -1], ValueError, "recent[1]: expected at least 0, got -1"),
        (4, [1, [1, 1]], TypeError, "recent[1]: expected an int, got list"),
        (None, 0, TypeError, "window_size: expected an int or one int per key/value head, got None"),
    ],
)
def test_errors_name_the_layer(windows, recent, error, message):
    model = causal_lm("Llama")
    with pytest.raises(error, match=re.escape(message)):
        convert_to_dma(model, windows, recent=recent)
    assert not any("value_gate" in name for name, _ in model.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("windows", [4, (4, (2, 30), [1, 3])])
def test_windows_may_be_set_between_calls_and_are_saved(windows, tmp_path):
    model, ids = converted(recency="slope"), distinct_tokens(2, 24)
    before, cache = model(ids).logits, DynamicMaskCache()
    model(ids, **{CACHE: cache})
    set_window_size(model, windows)
    same = converted(windows, recency="slope")
    same.load_state_dict(model.state_dict())
    assert (model(ids).logits - before).abs().max() > 1e-3
    assert_close(model(ids).logits, same(ids).logits)
    assert torch.equal(model.generate(ids, **GREEDY), same.generate(ids, **GREEDY))
    with pytest.raises(ValueError, match="window_size"):
        model(ids[:, :1], **{CACHE: cache})
    model.save_pretrained(tmp_path)
    assert_close(from_pretrained(tmp_path)(ids).logits, same(ids).logits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (7, "window_size: expected at most the model's own sliding window of 6, got 7"),
        (0, "window_size: expected at least 1, got 0"),
        ([5], "window_size: expected an int or one item per attention layer = 2, got 1 items"),
        (None, "window_size"),
    ],
)
def test_windows_that_cannot_be_set_change_nothing(wrong, message):
    model = convert_to_dma(causal_lm("Mistral"), 5)
    with pytest.raises((TypeError, ValueError), match=message):
        set_window_size(model, wrong)
    assert model.config.flexdma["window_size"] == 5
    assert {layer.self_attn.dynamic_mask_options["window_size"] for layer in model.model.layers} == {5}


def test_windows_of_a_model_without_gates_cannot_be_set():
    with pytest.raises(TypeError, match="model: expected one converted by convert_to_dma"):
        set_window_size(causal_lm("Llama"), 5)


@torch.no_grad()
def test_the_window_of_doge_may_be_set_and_is_saved(tmp_path):
    model, ids = use_flexdma(doge()), distinct_tokens(1, 24)
    before = model(ids).logits
    set_window_size(model, 3)
    after = model(ids).logits
    assert (after - before).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    assert_close(from_pretrained(tmp_path)(ids).logits, after)
    with pytest.raises(TypeError, match="window_size: expected an int"):
        set_window_size(model, [3, 3])
