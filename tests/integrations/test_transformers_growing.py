"""Models without windows: the cache holds the keys above the threshold, and reports its peak."""

import copy
from typing import Any

import pytest
import torch

from tests.integrations.hf_models import CACHE, assert_close, causal_lm, distinct_tokens, padding

from flexdma import GrowingState  # isort: skip  # after hf_models, which keeps transformers offline
from flexdma.integrations.transformers import DynamicMaskCache, convert_to_dma, distill, from_pretrained  # isort: skip
from flexdma.lifespans import above_threshold  # isort: skip

GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "no_repeat_ngram_size": 1}


def above_zero(**options):
    """A converted model in which about half of the gates are above 0, and its original."""
    original = causal_lm("Llama")
    model = convert_to_dma(copy.deepcopy(original), None, selection="threshold", form="identity", recent=2, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("value_gate.A"):
            torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(("beams", "options"), [(1, {}), (3, {}), (1, {"recency": "forget", "recency_ranks": False})])
def test_generate_finds_the_same_with_either_cache(beams, options):
    model, ids = above_zero(**options), distinct_tokens(2, 16)
    asked: dict[str, Any] = {"attention_mask": padding("left", ids), "num_beams": beams, **GREEDY}
    want = model.generate(ids, use_cache=False, **asked)
    out = model.generate(ids, return_dict_in_generate=True, **asked)
    assert torch.equal(out.sequences, want)
    assert isinstance(out[CACHE].layers[0].state, GrowingState)


def test_an_assistant_finds_the_same():
    model, ids, assistant = above_zero(), distinct_tokens(1, 16), above_zero()
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter += 0.2 * torch.randn_like(parameter)  # so that most of its proposals are rejected
    want = model.generate(ids, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), want)


@torch.no_grad()
def test_the_cache_reports_its_peak(tmp_path):
    model, ids, seen = above_zero(recency="slope"), distinct_tokens(2, 40), []
    model.save_pretrained(tmp_path)
    model = from_pretrained(tmp_path).eval()
    for layer in model.model.layers:
        layer.self_attn.value_gate.register_forward_hook(lambda *call: seen.append(call[2]))
    want = model(ids, use_cache=False).logits
    deaths = [above_threshold(gate, recent=2).death for gate in seen]
    visible = [(torch.arange(40) >= torch.arange(40)[:, None]) & (torch.arange(40) < d[..., None]) for d in deaths]
    cache = DynamicMaskCache()
    logits = [model(chunk, **{CACHE: cache}).logits for chunk in ids.split([20, *[1] * 20], 1)]
    assert_close(torch.cat(logits, 1), want)
    assert cache.peak == max(int(v.sum(-2).max()) for v in visible) < 40
    assert cache.peak_nbytes == cache.nbytes > 0
    cache.reset()
    assert cache.peak == cache.peak_nbytes == 0


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_decodes_in_reserved_slots():
    model, ids, cache = above_zero(), distinct_tokens(2, 40), DynamicMaskCache()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    logits = [model(ids[:, :20], **{CACHE: cache}).logits]
    for token in ids[:, 20:].split(1, 1):
        cache.reserve(1)
        logits.append(compiled(token, **{CACHE: cache}).logits)
    assert_close(torch.cat(logits, 1), model(ids, use_cache=False).logits)


def test_a_threshold_with_form_exp_starts_as_the_original():
    original, ids = causal_lm("Llama"), distinct_tokens(2, 30)
    model = convert_to_dma(copy.deepcopy(original), None, selection="threshold")
    assert_close(model(ids).logits, original(ids).logits)


def test_what_needs_a_window_names_it():
    with pytest.raises(TypeError, match=r"window_size: expected an int .*, got None"):
        convert_to_dma(causal_lm("Llama"), None)
    with pytest.raises(ValueError, match="window_size: expected at most the model's own sliding window of 6, got None"):
        convert_to_dma(causal_lm("Mistral"), None, selection="threshold")
    with pytest.raises(ValueError, match=r"selection: expected one of .* got 'global'"):
        convert_to_dma(causal_lm("Llama"), 4, selection="global")
    with pytest.raises(ValueError, match="model: expected layers with selection='causal', got 'threshold'"):
        distill(above_zero(), [distinct_tokens(1, 30)])
