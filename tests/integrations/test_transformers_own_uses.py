"""What callers do with a converted model besides running it: cast it, share configs, override them, subclass, save."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from flexdma.integrations.transformers import (
    DynamicMaskCache,
    convert_to_dma,
    from_pretrained,
    set_window_size,
    use_flexdma,
)
from tests.integrations.hf_models import CACHE, causal_lm, distinct_tokens, doge, gates

W = 7


class MyLlama(transformers.LlamaForCausalLM):
    """A class that transformers does not know."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reads_keys", [False, True])
def test_a_cast_model_keeps_float32_gates(dtype, reads_keys):
    model = convert_to_dma(causal_lm("Llama"), W, recency="slope", slopes=[1e-9, 1e-3], reads_keys=reads_keys)
    want = {name: p.clone() for name, p in gates(model).items()}
    for cast in (model.to(dtype), model.half(), model.bfloat16()):
        for name, p in gates(cast).items():
            assert p.dtype == torch.float32
            assert torch.equal(p, want[name])
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert all(p.is_meta and p.dtype == torch.float32 for p in gates(model.to("meta", dtype)).values())


def test_gates_are_float32_whatever_the_default_dtype():
    model = causal_lm("Llama")
    torch.set_default_dtype(torch.bfloat16)
    try:
        convert_to_dma(model, W, recency="slope")
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in gates(model).values()} == {torch.float32}


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_models_that_share_a_config_are_converted_apart(family, tmp_path):
    original, ids = causal_lm(family), distinct_tokens(1, 24)
    config, want = original.config, original(ids).logits
    first = convert_to_dma(type(original)(config), 4, recency="slope")
    second = convert_to_dma(type(original)(config), 5)
    assert not hasattr(config, "flexdma")
    assert torch.equal(original(ids).logits, want)
    assert [model.config.flexdma["window_size"] for model in (first, second)] == [4, 5]
    assert all(
        module.config is first.config
        for module in first.modules()
        if isinstance(getattr(module, "config", None), type(config))
    )
    set_window_size(second, 3)
    first.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(ids).logits, first(ids).logits)


def test_doge_models_that_share_a_config():
    original, ids = doge(), distinct_tokens(1, 24)
    want = original(ids).logits
    other = use_flexdma(type(original)(original.config))
    assert torch.equal(original(ids).logits, want)
    other.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"attn_implementation: expected None or 'flexdma', got 'sdpa'"):
        other(ids)


def test_arguments_override_the_saved_config(tmp_path):
    convert_to_dma(causal_lm("Llama"), W).save_pretrained(tmp_path)
    loaders = (from_pretrained, lambda *a, **k: AutoModelForCausalLM.from_pretrained(*a, trust_remote_code=True, **k))
    for load in loaders:
        model = load(tmp_path, use_cache=False, max_position_embeddings=77, dtype=torch.bfloat16)
        assert (model.config.use_cache, model.config.max_position_embeddings) == (False, 77)
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert load(tmp_path, config=str(tmp_path)).config.flexdma["window_size"] == W
    doge().save_pretrained(tmp_path / "doge")
    assert from_pretrained(tmp_path / "doge", keep_window_size=4).model.layers[0].self_attn.keep_window_size == 4


def test_a_class_of_ones_own_is_loaded_by_its_name_and_saved_with_a_warning(tmp_path):
    model, ids = convert_to_dma(MyLlama(causal_lm("Llama").config), W, recency="slope"), distinct_tokens(1, 24)
    for parameter in gates(model).values():
        torch.nn.init.normal_(parameter)
    with pytest.warns(UserWarning, match=r"save_pretrained: MyLlama is no class of transformers.*model_class=MyLlama"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got \['MyLlama'\]; give .*from_pretrained the model_class"):
        from_pretrained(tmp_path)
    again = from_pretrained(tmp_path, model_class=MyLlama)
    assert type(again) is MyLlama
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_mask_of_four_dimensions_is_not_taken_for_one_of_ours(dtype):
    model, ids = convert_to_dma(causal_lm("Llama"), W), distinct_tokens(2, 24)
    with pytest.raises(ValueError, match=r"attention_mask: expected \[B, tokens\].*got \[2, 1, 1, 24\]"):
        model(ids, attention_mask=torch.ones(2, 1, 1, 24, dtype=dtype))


@pytest.mark.parametrize(
    ("window", "options"),
    [
        (3, {}),
        (3, {"recency": "slope"}),
        (3, {"sinks": 2, "recent": 3}),
        (None, {"selection": "threshold", "form": "identity"}),
    ],
)
def test_a_cache_goes_on_outside_inference_mode(window, options):
    model, ids = convert_to_dma(causal_lm("Llama"), window, **options), distinct_tokens(2, 24)
    for name, parameter in gates(model).items():
        if name.endswith("A"):
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        want = model(ids).logits
    cache, parts = DynamicMaskCache(), []
    modes = [
        torch.inference_mode,
        torch.inference_mode,
        torch.no_grad,
        torch.inference_mode,
        torch.no_grad,
        torch.no_grad,
    ]
    for mode, part in zip(modes, ids.split([9, 1, 1, 1, 1, 11], 1), strict=True):
        with mode():
            parts.append(model(part, **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(parts, 1), want, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(CACHE == "past_key_values", reason="transformers before 5.24 may pass the last token alone then")
def test_a_model_that_drops_its_cache_gets_an_empty_one():
    """Phi3 reads all tokens again with other frequencies once there are more than it was trained with."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    factors["original_max_position_embeddings"] = 20
    original = causal_lm(
        "Phi3", original_max_position_embeddings=20, max_position_embeddings=80, rope_parameters=factors
    )
    ids, cache = distinct_tokens(1, 15), DynamicMaskCache()
    model = convert_to_dma(original, W)
    want = model.generate(ids, max_new_tokens=30, do_sample=False, use_cache=False)
    assert isinstance(want, torch.Tensor)
    for own in ({}, {CACHE: cache}):
        out = model.generate(ids, max_new_tokens=30, do_sample=False, return_dict_in_generate=True, **own)
        assert torch.equal(out.sequences, want)
        assert isinstance(out.past_key_values, DynamicMaskCache)
        assert [state.key.shape[2] for layer in out.past_key_values.layers if (state := layer.state)] == [W, W]
    assert cache.get_seq_length() == want.shape[1] - 1 > 20
    copied = copy.deepcopy(model)
    assert torch.equal(copied.generate(ids, max_new_tokens=30, do_sample=False), want)
    assert copied.prepare_inputs_for_generation.args[0] is copied
