"""A masked token has no effect on results, slopes, forget gates or gradients: sequences without it are the oracle."""

from typing import Any

import pytest
import torch
from torch import nn

from flexdma import DynamicMaskAttention, ValueGate, dynamic_mask_attention
from tests.comparison import gradients_of, inputs, with_gradients
from tests.integrations.hf_models import CACHE, causal_lm, distinct_tokens
from tests.test_modules import rotary

from flexdma.integrations.transformers import DynamicMaskCache, convert_to_dma  # isort: skip  # after hf_models, which keeps it offline

# Masked tokens at the beginning, between real ones and at the end; the rows have the same number of real tokens.
MASK = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 1, 0, 0]]).bool()
REAL = int(MASK[0].sum())
RECENCIES = [None, "slope", "forget"]
# Gates are computed in float32, and without masked tokens their sums run in another order.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def trained(recency, **options):
    torch.manual_seed(0)
    layer = DynamicMaskAttention(16, 4, 2, 4, 3, recency=recency, **options).double()
    for parameter in layer.gate.parameters():
        nn.init.normal_(parameter)
    return layer


def hidden_and_embeddings(rubbish=1.0):
    """Hidden states with different values in masked tokens each time, and a rotary embedding that skips those tokens."""
    hidden = torch.randn(2, MASK.shape[1], 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden = torch.where(MASK[..., None], hidden, rubbish * torch.randn_like(hidden))
    cos, sin = rotary(MASK.shape[1], 4)
    position = (MASK.cumsum(-1) - 1).clamp(min=0)
    return hidden, (cos[position].double(), sin[position].double())


def without_masked(tensor):
    return tensor[MASK].view(2, REAL, *tensor.shape[2:])


def backward(layer, output):
    layer.zero_grad()
    output.square().sum().backward()
    return gradients_of(layer.parameters())


@pytest.mark.parametrize("recency", RECENCIES)
@pytest.mark.parametrize("sinks", [0, 1])
def test_a_row_with_masked_tokens_is_the_row_without_them(recency, sinks):
    layer = trained(recency, sinks=sinks)
    hidden, embeddings = hidden_and_embeddings()
    want = layer(without_masked(hidden), tuple(map(without_masked, embeddings)))
    got = without_masked(layer(hidden, embeddings, key_padding_mask=MASK))
    torch.testing.assert_close(got, want, **CLOSE)
    for a, b in zip(backward(layer, got), backward(layer, want), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("recency", RECENCIES)
@pytest.mark.parametrize("sizes", [[14], [5, 4, 5], [3] + [1] * 11])
def test_through_a_state_too(recency, sizes):
    layer = trained(recency)
    hidden, embeddings = hidden_and_embeddings()
    want = layer(without_masked(hidden), tuple(map(without_masked, embeddings)))
    outputs, state, parts = [], None, (hidden, *embeddings, MASK)
    for part, cos, sin, mask in zip(*(t.split(sizes, 1) for t in parts), strict=True):
        output, state = layer(part, (cos, sin), key_padding_mask=mask, state=state, return_state=True)
        outputs.append(output)
    torch.testing.assert_close(without_masked(torch.cat(outputs, 1)), want, **CLOSE)
    assert state is not None
    assert state.real_length.tolist() == [REAL, REAL]
    assert state.length.tolist() == [14, 14]
    assert state.last_padding.tolist() == [13, 13]


@pytest.mark.parametrize("recency", RECENCIES)
@pytest.mark.parametrize("rubbish", [1e30, torch.nan])
def test_what_a_masked_token_holds_reaches_no_gate_and_no_gradient_of_one(recency, rubbish):
    gate, value = ValueGate(2, 4, recency=recency), torch.randn(2, 2, 14, 4)
    for parameter in gate.parameters():
        nn.init.normal_(parameter)
    results = []
    for held in (0.0, rubbish):
        gate.zero_grad()
        gates = gate(torch.where(MASK[:, None, :, None], value, held), key_padding_mask=MASK)
        gates = gates.masked_fill(~MASK[:, None], 0.0)
        gates.square().sum().backward()
        results.append([gates, *gradients_of(gate.parameters())])
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


@pytest.mark.parametrize("lowering", ["gather", "dense"])
@pytest.mark.parametrize("rubbish", [torch.inf, torch.nan])
def test_what_a_masked_key_holds_reaches_nothing(lowering, rubbish):
    query, *keys = inputs(2, 4, 2, 14, 14, 4)
    results = []
    for held in (0.0, rubbish):
        tensors = [t.clone() for t in keys]
        for tensor in tensors:
            tensor.transpose(1, 2)[~MASK] = held
        options = {"window_size": 3, "lowering": lowering, "key_padding_mask": MASK}
        results.append(with_gradients(dynamic_mask_attention, [query, *tensors], **options))
    for a, b in zip(*results, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


def test_the_mask_of_a_gate_is_checked():
    with pytest.raises(ValueError, match=r"key_padding_mask: expected \[2, 5\], got \[2, 4\]"):
        ValueGate(2, 4)(torch.zeros(2, 2, 5, 4), key_padding_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"key_padding_mask: expected torch.bool"):
        ValueGate(2, 4)(torch.zeros(2, 2, 5, 4), key_padding_mask=torch.ones(2, 5))
    with pytest.raises(ValueError, match="return_forgotten: expected False unless recency='forget'"):
        ValueGate(2, 4)(torch.zeros(2, 2, 5, 4), return_forgotten=True)


@torch.no_grad()
@pytest.mark.parametrize("recency", RECENCIES)
@pytest.mark.parametrize("sizes", [None, [14], [5, 4, 5]])  # without a cache, and in chunks through one
def test_in_a_converted_model(recency, sizes):
    model = convert_to_dma(causal_lm("Llama"), 3, recency=recency)
    for name, parameter in model.named_parameters():
        if "value_gate" in name:
            nn.init.normal_(parameter)
    real = distinct_tokens(2, REAL)
    ids = torch.randint(4, 64, MASK.shape).masked_scatter(MASK, real)
    mask, position = MASK.long(), (MASK.cumsum(-1) - 1).clamp(min=0)
    want = model(real).logits
    if sizes is None:
        got = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits
    else:
        outputs, start, cache = [], 0, DynamicMaskCache()
        for size in sizes:
            part = slice(start, start + size)
            arguments = {"attention_mask": mask[:, : part.stop], "position_ids": position[:, part]}
            outputs.append(model(ids[:, part], **arguments, **{CACHE: cache}).logits)
            start += size
        got = torch.cat(outputs, 1)
    torch.testing.assert_close(without_masked(got), want, **CLOSE)
