"""The layers refuse by name arguments that they do not compute."""

import pytest
import torch

from tests.integrations.hf_models import CACHE, causal_lm, distinct_tokens, doge

import transformers  # isort: skip
from transformers import DynamicCache  # isort: skip  # after hf_models, which keeps it offline
from flexdma.integrations.transformers import DynamicMaskCache, convert_to_dma, use_flexdma  # isort: skip


@pytest.fixture(params=["doge", "llama"])
def model(request):
    return use_flexdma(doge()) if request.param == "doge" else convert_to_dma(causal_lm("Llama"), 6)


def test_attention_weights(model):
    with pytest.raises(
        ValueError, match="output_attentions: expected None, as attention weights are never computed, got True"
    ):
        model(distinct_tokens(1, 8), output_attentions=True)


def test_a_head_mask(model):
    with pytest.raises(ValueError, match=r"head_mask: expected None, as heads are not masked, got a tensor \[2, 4\]"):
        model(distinct_tokens(1, 8), head_mask=torch.ones(2, 4))


@pytest.mark.parametrize(
    "make", [lambda **c: use_flexdma(doge(**c)), lambda **c: convert_to_dma(causal_lm("Llama", **c), 6)]
)
def test_attention_dropout_in_training_only(make):
    model, ids = make(attention_dropout=0.1), distinct_tokens(1, 8)
    assert model(ids).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"attention_dropout: expected 0 in training, got 0\.1"):
        model.train()(ids)


def test_attention_dropout_by_the_name_of_the_family():
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=64, bos_token_id=1, eos_token_id=2)
    model = convert_to_dma(transformers.GPT2LMHeadModel(config), 6).train()
    with pytest.raises(ValueError, match=r"attn_pdrop: expected 0 in training, got 0\.1"):
        model(distinct_tokens(1, 8))


def test_a_mask_of_queries_by_keys(model):
    with pytest.raises(ValueError, match=r"attention_mask: expected \[B, tokens\].*got \[1, 1, 8, 8\] of torch.bool"):
        model(distinct_tokens(1, 8), attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool))


def test_a_mask_of_another_length(model):
    with pytest.raises(
        ValueError, match=r"attention_mask: expected \[B, past and new tokens\] = \[1, 8\], got \[1, 7\]"
    ):
        model(distinct_tokens(1, 8), attention_mask=torch.ones(1, 7))


def test_bidirectional_attention(model):
    with pytest.raises(ValueError, match="is_causal: expected True, got False"):
        model(distinct_tokens(1, 8), is_causal=False)


def test_a_second_cache_under_another_name(model):
    with pytest.raises(
        TypeError, match="cache: expected one, got DynamicCache and DynamicMaskCache; transformers names"
    ):
        model(distinct_tokens(1, 8), **{CACHE: DynamicCache(), "other": DynamicMaskCache()})


@pytest.mark.parametrize(
    "make",
    [lambda: use_flexdma(doge(), lowering="flex"), lambda: convert_to_dma(causal_lm("Llama"), 6, lowering="flex")],
)
@torch.no_grad()
def test_a_growing_cache_around_a_compiled_flexattention(make):
    model = make()
    with pytest.raises(Exception, match=r"use_cache: expected False, or a DynamicMaskCache"):
        torch.compile(model, fullgraph=True, backend="eager")(distinct_tokens(1, 8))


def test_another_attention_for_gates():
    model = convert_to_dma(causal_lm("Llama"), 6)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation: expected 'flexdma' for a converted model, got 'sdpa'"):
        model(distinct_tokens(1, 8))


def test_gates_that_are_not_there():
    with pytest.raises(TypeError, match="expected a converted model for 'flexdma', got LlamaAttention without gates"):
        causal_lm("Llama").to("cpu").__class__(_flexdma_config())(distinct_tokens(1, 8))


def _flexdma_config():
    config = causal_lm("Llama").config
    config._attn_implementation = "flexdma"
    return config
