"""Models under torch.autocast train, generate, and keep a cache in autocast's dtype.

The tolerance of a model is twice the error of the original under autocast, compared with the original in float32.
"""

import copy

import pytest
import torch

from tests.integrations.hf_models import CACHE, FAMILIES, assert_close, causal_lm, distinct_tokens, doge

import transformers  # isort: skip  # after hf_models, which keeps it offline
from flexdma.integrations.transformers import DynamicMaskCache, convert_to_dma, use_flexdma

BF16, F32 = torch.bfloat16, torch.float32
LENGTH, NEW, NARROW = 16, 8, 6


def wide(family):
    """The original, and the model with flexdma, which computes the same because all tokens are in the window."""
    original = doge(keep_window_size=LENGTH) if family == "Doge" else causal_lm(family, sliding_window=LENGTH)
    if family == "Doge":
        return original, use_flexdma(copy.deepcopy(original))
    return original, convert_to_dma(copy.deepcopy(original), LENGTH)


def narrow(family):
    """A model with equal gates, because gates from rounded values may select other keys."""
    if family != "Doge":
        return convert_to_dma(causal_lm(family), NARROW)
    model = use_flexdma(doge(keep_window_size=NARROW))
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.A)
    return model


def autocast():
    return torch.autocast("cpu", BF16)


def loss_and_gradients(model, ids):
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "family", ["Doge", *sorted({*FAMILIES} - {"Qwen3Moe", "GptOss"})]
)  # rounded values choose other experts
def test_training_is_as_exact_as_that_of_the_original(family):
    original, model = wide(family)
    ids = distinct_tokens(2, LENGTH)
    exact, exact_gradients = loss_and_gradients(original, ids)
    with autocast():
        plain, plain_gradients = loss_and_gradients(original, ids)
        got, gradients = loss_and_gradients(model, ids)
    assert (got - exact).abs() <= 2 * (plain - exact).abs() + 2**-8 * exact
    for name, want in exact_gradients.items():
        assert gradients[name].dtype == F32
        error, allowed = ((g[name] - want).norm() for g in (gradients, plain_gradients))
        assert error <= 2 * allowed + 2**-6 * want.norm(), name
    assert all(p.abs().max() > 0 for name, p in gradients.items() if name.endswith("value_gate.A"))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("family", ["Doge", "Llama", "Qwen3"])
def test_generation_is_that_of_one_pass_over_its_tokens(family, dtype):
    model, ids = narrow(family).to(dtype), distinct_tokens(2, LENGTH)
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}
    with autocast():
        got = model.generate(ids, **options, output_logits=True, return_dict_in_generate=True)
        with torch.no_grad():
            want = model(got.sequences[:, :-1]).logits[:, LENGTH - 1 :].float()
        chunks = model.generate(ids, **options, prefill_chunk_size=5, return_dict_in_generate=True, output_logits=True)
    assert_close(torch.stack(got.logits, 1).float(), want, 2**-5)
    assert_close(chunks.logits[0].float(), want[:, 0], 2**-5)
    assert isinstance(got[CACHE], DynamicMaskCache)
    assert {t.dtype for layer in got[CACHE].layers for t in (layer.keys, layer.values)} == {BF16}


@pytest.mark.parametrize("family", ["Doge", "Llama"])
@torch.no_grad()
def test_a_cache_is_for_passes_under_autocast_or_outside_of_it(family):
    model, ids = narrow(family), distinct_tokens(1, LENGTH)
    cache = DynamicMaskCache()
    with autocast():
        model(ids[:, :8], **{CACHE: cache})
    with pytest.raises(TypeError, match=r"cache: expected keys of torch.float32, as the layer has, got torch.bfloat16"):
        model(ids[:, 8:9], **{CACHE: cache})
    with autocast():  # the refused pass has not changed the cache
        model(ids[:, 8:], **{CACHE: cache})
    assert cache.get_seq_length() == LENGTH
    cache = DynamicMaskCache()
    model(ids[:, :8], **{CACHE: cache})
    with autocast(), pytest.raises(TypeError, match=r"cache: expected keys of torch.bfloat16.*got torch.float32"):
        model(ids[:, 8:9], **{CACHE: cache})


@pytest.mark.parametrize("recency", [None, "forget"])
@torch.no_grad()
def test_a_rollback_outside_of_autocast_is_that_under_it(recency):
    model, ids = convert_to_dma(causal_lm("Llama"), 6, recency=recency), distinct_tokens(1, LENGTH)

    def state_after_rollback(context):
        cache = DynamicMaskCache()
        cache.activate_past_recording()
        with autocast():
            model(ids, **{CACHE: cache})
        with context:
            cache.crop(-3)
        return cache.layers[1].state

    want, got = state_after_rollback(autocast()), state_after_rollback(torch.autocast("cpu", enabled=False))
    assert got.length.item() == LENGTH - 3
    for name, tensor in got.tensors().items():
        assert torch.equal(tensor, want.tensors()[name]), name


@pytest.mark.parametrize("family", ["Doge", "Llama"])
def test_trainer_trains_in_bfloat16(family, tmp_path):
    def trained(model, **options):
        rows = [{"input_ids": row, "labels": row} for row in distinct_tokens(4, LENGTH)]
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, **options,
        )  # fmt: skip
        return transformers.Trainer(model, arguments, train_dataset=rows).train().training_loss

    _, model = wide(family)
    before = copy.deepcopy(model.state_dict())
    exact = trained(copy.deepcopy(model))
    assert trained(model, bf16=True) == pytest.approx(exact, rel=2**-7)
    gates = [name for name in before if name.endswith(("value_gate.A", "self_attn.A"))]
    assert gates
    assert all((model.state_dict()[name] != before[name]).all() for name in gates)
