"""Doge on flexdma: the oracle is the eager path of transformers, whose mask is dense."""

import copy
import json

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.integrations.hf_models import CACHE, assert_close, causal_lm, distinct_tokens, doge, padding

import transformers  # isort: skip  # after hf_models, which keeps it offline
from flexdma.integrations.transformers import DynamicMaskCache, from_pretrained, use_flexdma


def labels(ids, mask):
    """-100 for padding and for the token after it, which transformers predicts from a row whose keys are all masked."""
    before = torch.nn.functional.pad(mask, (1, 0), value=1)[:, :-1]
    return ids.masked_fill(mask * before == 0, -100)


def loss_and_gradients(model, ids, mask):
    model.zero_grad()
    output = model(ids, attention_mask=mask, labels=labels(ids, mask))
    output.loss.backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_logits_and_all_gradients_are_those_of_the_shipped_model(side):
    shipped, ids = doge(), distinct_tokens(2, 24)
    mask = padding(side, ids)
    want, want_gradients = loss_and_gradients(shipped, ids, mask)
    got, gradients = loss_and_gradients(use_flexdma(copy.deepcopy(shipped)), ids, mask)
    assert_close(got.logits[mask.bool()], want.logits[mask.bool()])
    assert gradients.keys() == want_gradients.keys()
    assert any("dt_proj" in name for name in gradients)
    for name, gradient in gradients.items():
        assert_close(gradient, want_gradients[name])


def test_the_window_matters_to_the_oracle():
    ids = distinct_tokens(2, 24)
    assert (doge()(ids).logits - doge(keep_window_size=24)(ids).logits).abs().max() > 0.1


def test_a_sequence_not_longer_than_the_window_is_full_attention():
    shipped, ids = doge(keep_window_size=24), distinct_tokens(2, 24)
    assert_close(use_flexdma(copy.deepcopy(shipped))(ids).logits, shipped(ids).logits)


def test_mixture_of_experts():
    shipped, ids = doge(is_moe=True, num_experts=16, num_experts_per_tok=2), distinct_tokens(2, 24)
    try:
        want = shipped(ids).logits
    except TypeError:
        pytest.skip(f"the MoE layer of transformers {transformers.__version__} does not run as shipped")
    assert_close(use_flexdma(copy.deepcopy(shipped))(ids).logits, want)


def test_weights_and_config_are_the_same_and_load_without_flexdma(tmp_path):
    shipped, ids = doge(), distinct_tokens(2, 24)
    model = use_flexdma(copy.deepcopy(shipped))
    assert list(model.state_dict()) == list(shipped.state_dict())
    shipped.save_pretrained(tmp_path / "shipped")
    model.save_pretrained(tmp_path / "flexdma")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("shipped", "flexdma")]
    assert configs[0] == configs[1]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "flexdma", attn_implementation="eager")
    assert torch.equal(plain(ids).logits, shipped(ids).logits)
    again = from_pretrained(tmp_path / "flexdma")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_using_it_twice_changes_nothing():
    model, ids = use_flexdma(doge()), distinct_tokens(1, 12)
    want = model(ids).logits
    assert torch.equal(use_flexdma(model)(ids).logits, want)


def test_a_bare_doge_model_works():
    shipped, ids = doge().model, distinct_tokens(1, 24)
    assert_close(use_flexdma(copy.deepcopy(shipped))(ids).last_hidden_state, shipped(ids).last_hidden_state)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_training_compiles_to_one_graph(backend):
    model, ids = use_flexdma(doge(num_hidden_layers=1)), distinct_tokens(2, 24)
    want, want_gradients = loss_and_gradients(model, ids, padding("right", ids))
    want_gradients = {name: gradient.clone() for name, gradient in want_gradients.items()}
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    model.zero_grad()
    mask = padding("right", ids)
    got = compiled(ids, attention_mask=mask, labels=labels(ids, mask), use_cache=False)
    got.loss.backward()
    assert_close(got.logits[mask.bool()], want.logits[mask.bool()])
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, want_gradients[name])
    assert counter.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@torch.no_grad()
def test_decoding_compiles_to_one_graph_that_serves_every_length(backend):
    model, ids = use_flexdma(doge()), distinct_tokens(2, 24)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert_close(compiled(ids, use_cache=False).logits, model(ids).logits)
    cache, same = DynamicMaskCache(), DynamicMaskCache()
    model(ids[:, :8], **{CACHE: cache})
    model(ids[:, :8], **{CACHE: same})
    counter.frame_count = 0
    for token in ids[:, 8:].split(1, 1):
        got = compiled(token, **{CACHE: cache}).logits
        assert_close(got, model(token, **{CACHE: same}).logits)
    assert counter.frame_count <= 2  # once for this length, once for any


@torch.no_grad()
def test_a_growing_cache_made_in_a_compiled_pass_goes_on():
    model, ids = use_flexdma(doge(num_hidden_layers=1)), distinct_tokens(2, 24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first = compiled(ids[:, :16])
    assert isinstance(first[CACHE], transformers.DynamicCache)
    later = compiled(ids[:, 16:], **{CACHE: first[CACHE]}).logits
    assert_close(torch.cat([first.logits, later], 1), model(ids).logits)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: torch.nn.Linear(1, 1), TypeError, "expected a transformers PreTrainedModel, got Linear"),
        (lambda: causal_lm("Llama"), TypeError, "expected a Doge model, got LlamaForCausalLM; convert_to_dma"),
        (lambda: doge(sliding_window=8), ValueError, "config.sliding_window: expected None"),
    ],
)
def test_other_models_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        use_flexdma(make())
