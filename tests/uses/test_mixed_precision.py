"""Under torch.autocast the operator equals a call on query, key and value cast by hand, as scaled_dot_product_attention."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from flexdma import DynamicMaskAttention, dynamic_mask_attention
from tests.comparison import gradients_of, inputs, with_gradients
from tests.test_modules import rotary

pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
OPTIONS: dict[str, Any] = {"window_size": 9, "sinks": 1, "recent": 2}


def mixed(query_dtype=F32, key_dtype=F32, value_dtype=BF16, length=150):
    """Dtypes after a rotary embedding: query and key in float32, values in autocast's dtype; gates that need float64."""
    query, key, value, gate = inputs(2, 4, 2, length, length, 16, dtype=F32)
    return [query.to(query_dtype), key.to(key_dtype), value.to(value_dtype), gate.double() + 2.0 * torch.arange(length)]


def under_autocast(*tensors, **options):
    """The operator under autocast, with its backward outside."""
    with torch.autocast("cpu", BF16):
        return dynamic_mask_attention(*tensors, **options)


def by_hand(tensors, dtype):
    return [*(t.to(dtype) for t in tensors[:3]), tensors[3]]


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("dtypes", [(F32, F32, BF16), (BF16, F32, F16), (F32, F32, F32)])
def test_the_dtype_is_that_of_scaled_dot_product_attention(dtypes, dtype):
    query, key, value, gate = mixed(*dtypes)
    with torch.autocast("cpu", dtype):
        got = dynamic_mask_attention(query, key, value, gate, **OPTIONS)
        plain = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    assert got.dtype == plain.dtype == dtype


@pytest.mark.parametrize("lowering", ["gather", "dense", None])
def test_outputs_and_gradients_are_those_of_a_cast_by_hand(lowering):
    tensors, options = mixed(), {**OPTIONS, "lowering": lowering}
    want = with_gradients(lambda *t: dynamic_mask_attention(*by_hand(t, BF16), **options), tensors)
    got = with_gradients(under_autocast, tensors, **options)
    for a, b, leaf in zip(got[1:], want[1:], tensors, strict=True):
        assert a.dtype == leaf.dtype
        assert torch.equal(a, b)
    assert torch.equal(got[0], want[0])
    with torch.autocast("cpu", BF16):  # matrix products of the backward are rounded too
        rounded = with_gradients(dynamic_mask_attention, tensors, **options)
    for a, b in zip(rounded, want, strict=True):
        torch.testing.assert_close(a, b, atol=2**-5, rtol=2**-5)


def test_logits_stay_in_float32():
    """The error comes from rounding inputs and output, not from scores in bfloat16."""
    tensors = by_hand(mixed(), BF16)
    with torch.autocast("cpu", BF16):
        got = dynamic_mask_attention(*tensors, **OPTIONS)
    want = dynamic_mask_attention(*by_hand(tensors, torch.float64), **OPTIONS)
    assert (got - want).abs().max() <= 2**-8 * want.abs().max()


def test_float64_is_left_alone():
    tensors = inputs(1, 2, 1, 20, 20, 8)
    want = dynamic_mask_attention(*tensors, **OPTIONS)
    with torch.autocast("cpu", BF16):
        assert torch.equal(dynamic_mask_attention(*tensors, **OPTIONS), want)


def test_other_mixtures_are_refused_where_there_is_no_autocast():
    with pytest.raises(TypeError, match=r"value: expected torch.float32 as query has, got torch.bfloat16"):
        dynamic_mask_attention(*mixed(), **OPTIONS)
    with (
        torch.autocast("cpu", BF16),
        pytest.raises(TypeError, match=r"value: expected torch.float64 as query has, got torch.bfloat16"),
    ):
        dynamic_mask_attention(*(t.double() for t in mixed()[:2]), *mixed()[2:], **OPTIONS)


def in_chunks(tensors, sizes):
    """Chunks and single tokens through a state."""
    outputs, state = [], None
    for chunk in zip(*(t.split(sizes, 2) for t in tensors), strict=True):
        output, state = dynamic_mask_attention(*chunk, state=state, return_state=True, **OPTIONS)
        outputs.append(output)
    return torch.cat(outputs, 2), state


def test_states_hold_keys_of_autocast_and_a_state_of_another_dtype_is_refused():
    tensors, sizes = mixed(length=30), [20, 1, 1, 8]
    want, _ = in_chunks(by_hand(tensors, BF16), sizes)
    with torch.autocast("cpu", BF16):
        got, state = in_chunks(tensors, sizes)
        whole = dynamic_mask_attention(*tensors, **OPTIONS)
    assert torch.equal(got, want)
    torch.testing.assert_close(got, whole, atol=2**-7, rtol=2**-7)
    assert (state.key.dtype, state.value.dtype, state.gate.dtype) == (BF16, BF16, torch.float64)
    with pytest.raises(TypeError, match=r"state: expected key of torch.float32, got torch.bfloat16"):
        dynamic_mask_attention(*(t[:, :, :1] for t in by_hand(tensors, F32)), state=state, **OPTIONS)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_with_autocast_around_it_and_inside_it(training):
    tensors = mixed()

    def attend(*t):
        return dynamic_mask_attention(*t, **OPTIONS)

    def inside(*t):
        with torch.autocast("cpu", BF16):
            return attend(*t)

    run = with_gradients if training else (lambda function, t: [function(*t)])
    want = run(lambda *t: attend(*by_hand(t, BF16)), tensors)
    with torch.autocast("cpu", BF16):
        around = run(torch.compile(attend, fullgraph=True), tensors)
    for got in (around, run(torch.compile(inside, fullgraph=True), tensors)):
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, atol=2**-6, rtol=2**-6)


class Float32Norm(nn.RMSNorm):
    """RMSNorm with the dtype that it has under autocast on CUDA."""

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


@pytest.mark.parametrize("recency", [None, "forget"])
def test_the_layer_trains_and_decodes_under_autocast(recency):
    layer = DynamicMaskAttention(32, 4, 2, 8, 5, recency=recency, qk_norm=True)
    layer.q_norm, layer.k_norm = Float32Norm(8), Float32Norm(8)
    nn.init.normal_(layer.gate.A)
    hidden, (cos, sin) = torch.randn(2, 20, 32), rotary(20, 8)
    exact = layer(hidden, (cos, sin))
    with torch.autocast("cpu", BF16):
        got = layer(hidden, (cos, sin))
        got.float().square().sum().backward()
        with torch.no_grad():
            state, pieces, start = layer.empty_state(2), [], 0
            for piece in hidden.split([12, 1, 1, 6], 1):
                end = start + piece.shape[1]
                output, state = layer(piece, (cos[start:end], sin[start:end]), state=state, return_state=True)
                pieces.append(output)
                start = end
    assert got.dtype == state.key.dtype == BF16
    assert all(g.dtype == F32 and g.isfinite().all() for g in gradients_of(layer.parameters()))
    # Gates from bfloat16 values may select other keys, so only the mean error is small.
    assert (got - exact).abs().mean() < 0.02 * exact.abs().mean() + 0.02
    torch.testing.assert_close(torch.cat(pieces, 1), got, atol=2**-6, rtol=2**-6)


@pytest.mark.parametrize("enabled", [False, True])
def test_a_layer_in_bfloat16_with_gates_in_float32_decodes_from_an_empty_state(enabled):
    layer = DynamicMaskAttention(32, 4, 2, 8, 9, recency="forget").to(BF16)
    layer.gate.float()
    hidden = torch.randn(2, 12, 32, dtype=BF16)
    with torch.autocast("cpu", BF16, enabled=enabled), torch.no_grad():
        state, pieces = layer.empty_state(2), []
        for piece in hidden.split([10, 1, 1], 1):
            output, state = layer(piece, state=state, return_state=True)
            pieces.append(output)
        torch.testing.assert_close(torch.cat(pieces, 1), layer(hidden), atol=2**-6, rtol=2**-6)
    assert state.key.dtype == BF16
