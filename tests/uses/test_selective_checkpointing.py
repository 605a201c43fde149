"""Gradients equal those without checkpointing, for every policy of activation checkpointing."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flexdma import DynamicMaskAttention, dynamic_mask_attention
from flexdma.integrations.transformers import convert_to_dma
from flexdma.lowerings import gather, plain
from tests.comparison import inputs, with_gradients
from tests.integrations.hf_models import causal_lm, distinct_tokens

PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default]


def save_everything(context, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE


def save_every_other(context, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if len(str(operator)) % 2 else CheckpointPolicy.MUST_RECOMPUTE


POLICIES = {"products": PRODUCTS, "everything": save_everything, "every other": save_every_other, "nothing": []}


def checkpointed(function, policy):
    context = partial(create_selective_checkpoint_contexts, POLICIES[policy])
    return lambda *t: checkpoint(function, *t, use_reentrant=False, context_fn=context)


def in_chunks(*tensors, sizes=(100, 1, 28), **options):
    outputs, state = [], None
    for chunk in zip(*(t.split(sizes, 2) for t in tensors), strict=True):
        output, state = dynamic_mask_attention(*chunk, state=state, return_state=True, **options)
        outputs.append(output)
    return torch.cat(outputs, 2)


CALLS: dict[str, Callable[..., torch.Tensor]] = {
    "gather": dynamic_mask_attention,
    "dense": partial(dynamic_mask_attention, lowering="dense"),
    "score_mod": partial(dynamic_mask_attention, score_mod=lambda s, b, h, i, j: s.tanh()),
    "state": in_chunks,
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CALLS)
def test_the_operator(name, policy):
    tensors = inputs(2, 4, 2, 129, 129, 16)
    call = partial(CALLS[name], window_size=20, sinks=1, recent=2)
    want, got = with_gradients(call, tensors), with_gradients(checkpointed(call, policy), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_compiled():
    tensors = inputs(2, 4, 2, 129, 129, 16)
    call = partial(dynamic_mask_attention, window_size=20)
    compiled = torch.compile(checkpointed(call, "products"), backend="aot_eager", fullgraph=True)
    want, got = with_gradients(call, tensors), with_gradients(compiled, tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kept", [2**40, 0])
def test_scores_in_chunks(policy, kept, monkeypatch):
    monkeypatch.setattr(gather, "is_fusible", lambda *call: False)
    monkeypatch.setattr(plain, "CHUNK_ELEMENTS", 4000)
    monkeypatch.setattr(plain, "KEPT_ELEMENTS", kept)
    tensors = inputs(2, 4, 2, 129, 129, 16)
    call = partial(dynamic_mask_attention, window_size=20, block_size=16)
    want, got = with_gradients(call, tensors), with_gradients(checkpointed(call, policy), tensors)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def gradients(module, output):
    module.zero_grad()
    output.square().sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("policy", POLICIES)
def test_the_layer(policy):
    layer = DynamicMaskAttention(32, 4, 2, 8, 5, recency="forget")
    torch.nn.init.normal_(layer.gate.A)
    hidden = torch.randn(2, 40, 32)
    want = gradients(layer, layer(hidden))
    torch.testing.assert_close(gradients(layer, checkpointed(layer, policy)(hidden)), want)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_converted_model(policy):
    model, ids = convert_to_dma(causal_lm("Llama"), 6, recency="slope"), distinct_tokens(2, 24)
    want = gradients(model, model(ids, use_cache=False).logits)
    got = gradients(model, checkpointed(lambda ids: model(ids, use_cache=False).logits, policy)(ids))
    torch.testing.assert_close(got, want)
