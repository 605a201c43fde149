"""Variants of the layer: a gate on its output, and fewer query heads than the model has."""

import pytest
import torch
from torch import nn

from flexdma import DynamicMaskAttention, cost
from flexdma.reference import dense_dynamic_mask_attention
from tests.comparison import gradients_of
from tests.test_modules import rotary


def test_the_output_gate_is_computed_from_the_input_for_each_number_of_a_head():
    """Position G1 of the paper: after the attention, before the output projection, elementwise and head by head."""
    layer = DynamicMaskAttention(32, 4, 2, 8, 5, output_gate=True, bias=True, recent=2).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    hidden, tables = torch.randn(2, 20, 32, dtype=torch.float64), rotary(20, 8)
    results = []
    for slow in (False, True):
        layer.zero_grad()
        if slow:
            query, key, value = layer.project(hidden, tables)
            heads = dense_dynamic_mask_attention(query, key, value, layer.gate(value), window_size=5, recent=2)
            logits = hidden @ layer.g_proj.weight.T + layer.g_proj.bias
            joined = torch.cat([heads[:, h] / (1 + torch.exp(-logits[..., 8 * h : 8 * h + 8])) for h in range(4)], -1)
            output = joined @ layer.o_proj.weight.T + layer.o_proj.bias
        else:
            output = layer(hidden, tables)
        output.square().sum().backward()
        results.append([output.detach(), *gradients_of(layer.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # gates are float32


def test_a_layer_without_an_output_gate_starts_as_before():
    starts = []
    for gated in (False, True):
        torch.manual_seed(0)
        starts.append(DynamicMaskAttention(32, 4, 2, 8, 5, output_gate=gated).state_dict())
    before, after = starts
    assert set(after) - set(before) == {"g_proj.weight"}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with pytest.raises(TypeError, match="output_gate: expected a bool, got 'sigmoid'"):
        DynamicMaskAttention(32, 4, 2, 8, 5, output_gate="sigmoid")  # type: ignore[arg-type]  # refused


@pytest.mark.parametrize("recency", [None, "forget"])
@torch.no_grad()
def test_a_gated_layer_reads_in_chunks_and_packed_rows(recency):
    layer = DynamicMaskAttention(32, 4, 2, 8, 5, output_gate=True, recency=recency).double()
    nn.init.normal_(layer.gate.A)
    hidden = torch.randn(1, 20, 32, dtype=torch.float64)
    want, state, outputs = layer(hidden), None, []
    for part in hidden.split([9, 1, 1, 8, 1], 1):
        output, state = layer(part, state=state, return_state=True)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), want)
    packed = layer(hidden, cu_seqlens=torch.tensor([0, 12, 20]))
    torch.testing.assert_close(packed, torch.cat([layer(hidden[:, :12]), layer(hidden[:, 12:])], 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float()(hidden.float()).dtype == torch.bfloat16


# A model of 8 heads; (Hq, Hkv) of the variants of Sparse Query Attention (arXiv 2510.01817).
VARIANTS = {"SQA": (4, 2), "sSQA": (4, 4), "xSQA": (2, 2), "xSMQA": (2, 1)}


@pytest.mark.parametrize("name", VARIANTS)
def test_fewer_query_heads_than_the_model_has(name):
    heads, kv_heads = VARIANTS[name]
    layer = DynamicMaskAttention(64, heads, kv_heads, 8, 5).double()
    assert layer.o_proj.weight.shape == (64, heads * 8)
    hidden = torch.randn(2, 20, 64, dtype=torch.float64)
    query, key, value = layer.project(hidden)
    want = dense_dynamic_mask_attention(query, key, value, layer.gate(value), window_size=5)
    torch.testing.assert_close(layer(hidden), want.transpose(1, 2).flatten(2) @ layer.o_proj.weight.T)


def test_the_cost_of_scores_is_proportional_to_query_heads():
    sizes = {"B": 1, "N": 2**15, "w": 1024, "D": 64, "Dv": 64, "rows": 128, "columns": 128, "element": 2, "rho": 1.2}
    # Symmetric variants keep G = Hq / Hkv = 1, and so their blocks.
    whole, half, quarter = (cost.forward().at(Hq=heads, Hkv=heads, **sizes)["flops"] for heads in (16, 8, 4))
    assert half == pytest.approx(whole / 2, rel=0.01)
    assert quarter == pytest.approx(whole / 4, rel=0.01)
