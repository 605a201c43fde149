"""A recency that is added to logits and does not rank: the gate returns it apart, and layers pass it on as a bias."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from flexdma import DynamicMaskAttention, DynamicMaskLatentAttention, ValueGate
from flexdma.reference import dense_dynamic_mask_attention
from tests.comparison import gradients_of
from tests.test_modules import rotary

RECENCIES = pytest.mark.parametrize("recency", ["slope", "forget"])
LATENT: dict[str, Any] = {"kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
MASK = torch.arange(20) >= torch.tensor([[0], [6]])


def made(recency, **options):
    """A layer whose recency outweighs its gates."""
    torch.manual_seed(0)
    layer = DynamicMaskAttention(
        32, 4, 2, 8, 5, recency=recency, recency_ranks=False, lowering=None, recent=1, **options
    ).double()
    if recency == "slope":
        torch.nn.init.constant_(layer.gate.slope, 0.7)
    return layer


@pytest.mark.parametrize("options", [{}, {"key_padding_mask": MASK}], ids=["whole", "padded"])
@RECENCIES
def test_the_parts_of_a_gate(recency, options):
    """The gate without its recency is the gate of the same parameters without one; the two add up to the gate."""
    gate, value = ValueGate(2, 3, "linear", recency, initial_a=0.5), torch.randn(2, 2, 20, 3)
    alone = ValueGate(2, 3, "linear", initial_a=0.5)
    alone.load_state_dict(gate.state_dict(), strict=False)
    content, added = gate(value, return_recency=True, **options)
    assert torch.equal(content, alone(value, **options))
    assert torch.equal(content.double() + added, gate(value, **options))
    assert (content.dtype, added.dtype, added.shape) == (torch.float32, torch.float64, content.shape)
    real = MASK if options else torch.ones(2, 20, dtype=torch.bool)
    if recency == "slope":
        want = gate.slope.double()[:, None] * (real.cumsum(-1) - real.long())[:, None]
    else:
        joined = gate.forget_proj(value.transpose(1, 2).flatten(2))
        want = torch.log1p(torch.exp(-joined)).mT.double().masked_fill(~real[:, None], 0.0).cumsum(-1)
    torch.testing.assert_close(added[real[:, None].expand_as(added)], want[real[:, None].expand_as(added)])


def test_the_parts_of_a_gate_go_on_from_earlier_tokens():
    value = torch.randn(2, 2, 9, 3)
    slope, forget = ValueGate(2, 3, recency="slope"), ValueGate(2, 3, recency="forget")
    _, whole = slope(value, return_recency=True)
    for first, last in ((4, 9), (4, 5)):
        part = slope(value[:, :, first:last], first_position=first, return_recency=True)[1]
        assert torch.equal(part, whole[:, :, first:last])
    _, whole, total = forget(value, return_recency=True, return_forgotten=True)
    _, before, carried = forget(value[:, :, :4], return_recency=True, return_forgotten=True)
    _, after = forget(value[:, :, 4:], forgotten=carried, return_recency=True)
    torch.testing.assert_close(torch.cat([before, after], -1), whole)
    assert torch.equal(total, whole[..., -1])


@pytest.mark.parametrize("options", [{}, {"key_padding_mask": MASK}], ids=["whole", "padded"])
@RECENCIES
def test_a_layer_ranks_by_its_gates_and_adds_the_recency(recency, options):
    layer, hidden, tables = made(recency, qk_norm=True), torch.randn(2, 20, 32).double(), rotary(20, 8)
    results = []
    for by_hand in (False, True):
        layer.zero_grad()
        if by_hand:
            query, key, value = layer.project(hidden, tables)
            gate, bias = layer.gate(value, return_recency=True, **options)
            heads = dense_dynamic_mask_attention(query, key, value, gate, bias=bias, window_size=5, recent=1, **options)
            output = layer.o_proj(heads.transpose(1, 2).flatten(2))
        else:
            output = layer(hidden, tables, **options)
        output.square().sum().backward()
        results.append([output.detach(), *gradients_of(layer.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # gates are float32
        assert want.abs().sum() > 0


def test_equal_gates_are_a_window_with_alibi():
    """Of equal gates the newer ranks higher, as it does where a slope ranks."""
    layer, ranking = made("slope"), DynamicMaskAttention(32, 4, 2, 8, 5, recency="slope", recent=1).double()
    torch.nn.init.zeros_(layer.gate.A)
    ranking.load_state_dict(layer.state_dict())
    hidden = torch.randn(2, 20, 32).double()
    torch.testing.assert_close(layer(hidden), ranking(hidden))


@RECENCIES
def test_packed_sequences_are_each_alone(recency):
    layer, lengths, hidden = made(recency), [5, 0, 14, 1], torch.randn(1, 20, 32).double()
    packed, states = layer(hidden, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0), return_state=True)
    alone = torch.cat([layer(row) for row in hidden.split(lengths, 1) if row.shape[1]], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    later = torch.randn(4, 3, 32).double()
    got = layer(later, state=states)
    for number, row in enumerate(hidden.split(lengths, 1)):
        whole = layer(torch.cat([row, later[number : number + 1]], 1))
        torch.testing.assert_close(got[number], whole[0, -3:], rtol=1e-5, atol=1e-5)


LAYERS: dict[str, Any] = {
    "bounded": lambda **options: DynamicMaskAttention(32, 4, 2, 8, 5, recent=1, sinks=1, **options),
    "growing": lambda **options: DynamicMaskAttention(32, 4, 2, 8, None, selection="threshold", **options),
    "latent": lambda **options: DynamicMaskLatentAttention(32, 4, 5, recent=1, **LATENT, **options),
    "growing latent": lambda **options: DynamicMaskLatentAttention(
        32, 4, None, selection="threshold", **LATENT, **options
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@RECENCIES
@pytest.mark.parametrize("training", [False, True])
def test_any_chunks_are_one_pass(name, recency, training):
    torch.manual_seed(0)
    layer = LAYERS[name](recency=recency, recency_ranks=False).double().requires_grad_(training)
    hidden, state, outputs, start = torch.randn(2, 20, 32).double(), layer.empty_state(2), [], 0
    assert (state.gate.dtype, state.bias.dtype) == (torch.float32, torch.float64)
    for size in (9, 1, 1, 1, 7, 1):
        part = slice(start, start + size)
        output, state = layer(hidden[:, part], state=state, return_state=True, key_padding_mask=MASK[:, part])
        outputs.append(output)
        start += size
    torch.testing.assert_close(torch.cat(outputs, 1), layer(hidden, key_padding_mask=MASK), rtol=1e-5, atol=1e-5)


def test_the_gate_is_called_as_a_module():
    """So that hooks, adapters and sharding act."""
    layer, calls = made("forget"), []
    layer.gate.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    layer(torch.randn(1, 4, 32).double())
    assert calls == [2]


@RECENCIES
def test_a_latent_layer_is_the_operator_over_its_keys_and_values(recency):
    torch.manual_seed(0)
    layer = DynamicMaskLatentAttention(24, 3, 5, **LATENT, recency=recency, recency_ranks=False, recent=1).double()
    hidden, options = torch.randn(2, 20, 24).double(), dict[str, Any](key_padding_mask=MASK)
    nope, rope, shared, latent = layer.project(hidden)
    up = layer.kv_b_proj(latent[:, 0]).unflatten(-1, (3, 11)).transpose(1, 2)
    gate, bias = layer.gate(latent, return_recency=True, **options)
    heads = dense_dynamic_mask_attention(
        torch.cat([nope, rope], -1), torch.cat([up[..., :6], shared.expand(-1, 3, -1, -1)], -1), up[..., 6:], gate,
        bias=bias, window_size=5, recent=1, **options,
    )  # fmt: skip
    want = layer.o_proj(heads.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(hidden, **options), want, rtol=1e-6, atol=1e-6)


def test_a_compiled_layer_trains_at_changing_lengths():
    layer, counter = made("slope").float(), CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for length in (40, 41, 300):
        hidden, results = torch.randn(1, length, 32), []
        for function in (layer, compiled):
            layer.zero_grad()
            function(hidden).square().sum().backward()
            results.append(gradients_of(layer.parameters()))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)
    assert counter.frame_count == 2  # the first length, others


def test_under_autocast_the_recency_stays_in_float64():
    layer, hidden, seen = made("slope").float(), torch.randn(1, 20, 32), []
    layer.gate.register_forward_hook(lambda module, inputs, output: seen.append([part.dtype for part in output]))
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(hidden)
        output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16
    assert seen == [[torch.float32, torch.float64]]
    assert all(gradient.isfinite().all() for gradient in gradients_of(layer.parameters()))


def test_wrong_arguments_are_named():
    for kind, sizes in ((DynamicMaskAttention, (32, 4, 2, 8, 5)), (DynamicMaskLatentAttention, (32, 4, 5))):
        make: Any = kind
        with pytest.raises(ValueError, match=r"recency_ranks: expected True with recency=None, .* got False"):
            make(*sizes, recency_ranks=False)
        with pytest.raises(TypeError, match="recency_ranks: expected a bool, got 0"):
            make(*sizes, recency="slope", recency_ranks=0)
        assert "recency_ranks=False" in repr(make(*sizes, recency="slope", recency_ranks=False))
        assert "recency_ranks" not in repr(make(*sizes, recency="slope"))
    with pytest.raises(ValueError, match=r"return_recency: expected False with recency=None, .* got True"):
        ValueGate(2, 8)(torch.randn(1, 2, 5, 8), return_recency=True)
