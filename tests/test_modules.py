"""Gates and the layer: closed forms, Doge's parameter names, precision far into a sequence, one graph when compiled."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from flexdma import DynamicMaskAttention, ValueGate, choose_lowering
from flexdma.reference import dense_dynamic_mask_attention
from tests.comparison import gather, gradients_of, inputs


def rotary(length, size):
    angle = torch.outer(torch.arange(length), 1e4 ** (-torch.arange(0, size, 2) / size)).repeat(1, 2)
    return angle.cos(), angle.sin()


def test_a_new_gate_ranks_keys_or_is_constant_so_that_attention_starts_as_a_sliding_window():
    value = torch.randn(1, 2, 5, 4)
    assert ValueGate(2, 4)(value).unique().numel() == 10
    assert torch.equal(ValueGate(2, 4, initial_a=0.0)(value), torch.zeros(1, 2, 5))
    with pytest.raises(TypeError, match="initial_a: expected a number or None, got str"):
        ValueGate(2, 4, **{"initial_a": "1"})  # type: ignore[arg-type]
    assert torch.equal(ValueGate(2, 4, form="exp")(value), torch.ones(1, 2, 5))
    assert torch.equal(ValueGate(2, 4, form="linear")(value), torch.zeros(1, 2, 5))


@pytest.mark.parametrize("form", ["exp", "linear", "identity"])
def test_the_gate_is_its_formula(form):
    gate, value = ValueGate(2, 3, form=form, bias=True), torch.randn(2, 2, 4, 3)
    torch.nn.init.normal_(gate.A)
    joined = torch.cat([value[:, 0], value[:, 1]], -1)
    projected = (joined @ gate.dt_proj.weight.T + gate.dt_proj.bias).mT
    want = gate.A[:, None] * (projected if form == "identity" else torch.log1p(torch.exp(projected)))
    torch.testing.assert_close(gate(value), want.exp() if form == "exp" else want)


def test_recency_is_its_formula():
    value = torch.randn(1, 2, 4, 3)
    slope = ValueGate(2, 3, "exp", "slope", slopes=[0.5, 0.25])
    assert slope(value, first_position=7).tolist() == [[[4.5, 5.0, 5.5, 6.0], [2.75, 3.0, 3.25, 3.5]]]
    for position in (9, torch.tensor([9])):
        assert slope(value[:, :, 2:3], first_position=position).tolist() == [[[5.5], [3.25]]]
    forget = ValueGate(2, 3, "exp", "forget")
    torch.nn.init.zeros_(forget.forget_proj.weight)
    step = math.log1p(math.exp(-3))
    want = 1 + step * torch.arange(1, 5, dtype=torch.float64).expand(1, 2, 4)
    torch.testing.assert_close(forget(value), want, atol=1e-7, rtol=0)
    carried = torch.tensor([[10.0, 20.0]], dtype=torch.float64)
    torch.testing.assert_close(forget(value, forgotten=carried), want + carried[..., None], atol=1e-7, rtol=0)


def test_parameters_are_named_as_in_doge():
    names = {name: tuple(p.shape) for name, p in ValueGate(2, 8).named_parameters()}
    assert names == {"A": (2,), "dt_proj.weight": (2, 16)}


@pytest.mark.parametrize("recency", ["slope", "forget"])
def test_the_error_at_position_a_million_equals_the_error_at_a_thousand(recency):
    torch.manual_seed(3)
    query, key, value, _ = inputs(1, 4, 2, 300, 300, 16, dtype=torch.float32)
    gate = ValueGate(2, 16, recency=recency)
    torch.nn.init.normal_(gate.A)

    def error(start, dtype):
        if recency == "slope":
            gates = gate(value, first_position=start)
        else:
            gates = gate(value, forgotten=torch.full((1, 2), 0.048587351573742056 * start, dtype=torch.float64))
        near = gate(value)
        got = gather(query, key, value, gates.to(dtype), window_size=64)
        want = dense_dynamic_mask_attention(query.double(), key.double(), value.double(), near, window_size=64)
        return (got - want).abs().max().item()

    at_thousand, at_million = error(1_000, torch.float64), error(1_000_000, torch.float64)
    assert at_million <= 1.5 * at_thousand + 1e-7
    # The control: the error of gates rounded to float32 is much larger.
    assert error(1_000_000, torch.float32) > 100 * at_million


@pytest.mark.parametrize(("recency", "qk_norm"), [(None, False), ("slope", True), ("forget", True)])
def test_the_layer_is_the_composition_of_its_parts(recency, qk_norm):
    layer = DynamicMaskAttention(32, 4, 2, 8, 5, recency=recency, qk_norm=qk_norm, recent=2, lowering="dense").double()
    hidden, (cos, sin) = torch.randn(2, 20, 32, dtype=torch.float64), rotary(20, 8)
    query, key, value = layer.project(hidden, (cos, sin))

    def turned(x, norm):  # pairs (d, d + 4) as complex numbers
        x = norm(x).transpose(1, 2)
        z = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos[:, :4].double(), sin[:, :4].double())
        return torch.cat([z.real, z.imag], -1)

    torch.testing.assert_close(query, turned(layer.q_proj(hidden).view(2, 20, 4, 8), layer.q_norm))
    torch.testing.assert_close(key, turned(layer.k_proj(hidden).view(2, 20, 2, 8), layer.k_norm))
    attended = dense_dynamic_mask_attention(query, key, value, layer.gate(value), window_size=5, recent=2)
    want = layer.o_proj(attended.transpose(1, 2).reshape(2, 20, 32))
    torch.testing.assert_close(layer(hidden, (cos, sin)), want)


def test_every_parameter_is_trained():
    layer = DynamicMaskAttention(32, 4, 2, 8, 5, recency="slope", qk_norm=True)
    torch.nn.init.normal_(layer.gate.A)
    layer(torch.randn(2, 40, 32), rotary(40, 8)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_compiled_layer_is_one_graph_and_does_not_recompile_for_new_batches():
    """Training and inference; both equal the eager layer."""
    layer = DynamicMaskAttention(32, 4, 2, 16, 9, recency="slope")
    torch.nn.init.normal_(layer.gate.A)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    embeddings = rotary(150, 16)
    for seed in range(3):
        hidden = torch.randn(2, 150, 32, generator=torch.Generator().manual_seed(seed))
        results = []
        for function in (layer, compiled):
            layer.zero_grad()
            output = function(hidden, embeddings)
            output.square().sum().backward()
            results.append([output.detach(), *gradients_of(layer.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)
    assert counter.frame_count == 1
    with torch.no_grad():
        for seed in range(3):
            hidden = torch.randn(2, 150, 32, generator=torch.Generator().manual_seed(seed))
            torch.testing.assert_close(compiled(hidden, embeddings), layer(hidden, embeddings), atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 2


def test_the_choice_of_lowering_is_visible():
    assert choose_lowering("cuda", torch.bfloat16) == "flex"
    assert choose_lowering("cuda", torch.float64) == "gather"
    assert choose_lowering("cpu", torch.float32) == "gather"
    assert choose_lowering("mps", torch.float32) == "gather"


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="form: expected one of 'exp', 'linear', 'identity', got 'tanh'"):
        ValueGate(2, 4, form="tanh")
    with pytest.raises(ValueError, match="recency: expected one of None, 'slope', 'forget', got 'alibi'"):
        ValueGate(2, 4, recency="alibi")
    with pytest.raises(ValueError, match="slopes: expected None unless recency='slope'"):
        ValueGate(2, 4, slopes=[1, 2])
    with pytest.raises(TypeError, match=r"slopes: expected a sequence of numbers, got 0\.5"):
        ValueGate(2, 4, recency="slope", slopes=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="slopes: expected 2 numbers, one per KV head, got 3"):
        ValueGate(2, 4, recency="slope", slopes=[1, 2, 3])
    with pytest.raises(ValueError, match=r"value: expected \[B, 2, K, 4\], got \[1, 3, 5, 4\]"):
        ValueGate(2, 4)(torch.zeros(1, 3, 5, 4))
    with pytest.raises(ValueError, match="num_heads: expected a multiple of num_kv_heads = 2, got 3"):
        DynamicMaskAttention(32, 3, 2, 8, 4)
    with pytest.raises(ValueError, match="window_size: expected at least 1, got 0"):
        DynamicMaskAttention(32, 4, 2, 8, 0)
    with pytest.raises(ValueError, match=r"position_embeddings, cos: expected \[5, 8\], got \[5, 4\]"):
        DynamicMaskAttention(32, 4, 2, 8, 4)(torch.zeros(2, 5, 32), (torch.zeros(5, 4), torch.zeros(5, 4)))
    with pytest.raises(TypeError, match="dropout"):
        DynamicMaskAttention(32, 4, 2, 8, 4, dropout=0.1)  # type: ignore[call-arg]  # refused
    with pytest.raises(ValueError, match=r"hidden_states: expected \[B, N, 32\], got \[2, 5, 16\]"):
        DynamicMaskAttention(32, 4, 2, 8, 4)(torch.zeros(2, 5, 16))
