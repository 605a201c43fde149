"""Offloading by accelerate changes no number: the model with its weights in place is the oracle."""

import copy

import accelerate
import pytest
import torch

from tests.integrations.hf_models import CACHE, causal_lm, distinct_tokens, doge

from flexdma.integrations.transformers import DynamicMaskCache, convert_to_dma, use_flexdma  # isort: skip

# transformers 5.17 warns that the first weight is on the meta device.
pytestmark = pytest.mark.filterwarnings("ignore:You are calling .generate:UserWarning")
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def gated(recency, **options):
    model = convert_to_dma(causal_lm("Llama"), 6, recency=recency, **options)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.value_gate.A)
    return model


@torch.no_grad()
def after_a_rollback(model, ids):
    cache = DynamicMaskCache()
    model(ids[:, :8], **{CACHE: cache})
    cache.activate_past_recording()
    model(ids[:, 8:14], **{CACHE: cache})
    cache.crop(-4)
    return model(ids[:, 10:], **{CACHE: cache}).logits


@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: use_flexdma(doge()),
        lambda: gated("slope"),
        lambda: gated("forget"),
        lambda: gated("forget", recency_ranks=False),
    ],
)
def test_an_offloaded_model_computes_and_generates_the_same(make, place, tmp_path):
    model, ids = make(), distinct_tokens(2, 16)
    want = model(ids).logits, model.generate(ids, **GREEDY), after_a_rollback(model, ids)
    away = copy.deepcopy(model)
    if place == "cpu":
        accelerate.cpu_offload(away, execution_device="cpu")
    else:
        accelerate.disk_offload(away, str(tmp_path), execution_device="cpu")
    assert all(parameter.is_meta for parameter in away.parameters())
    got = away(ids).logits, away.generate(ids, **GREEDY), after_a_rollback(away, ids)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
