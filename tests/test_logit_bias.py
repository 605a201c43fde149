"""A bias is added to logits beside the gate, and does not rank: outputs and all gradients are those of the specification."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jvp, vmap

from flexdma import dynamic_mask_attention, dynamic_mask_attention_varlen
from flexdma.lowerings import gather as gather_module
from flexdma.reference import dense_dynamic_mask_attention
from tests.comparison import gather, inputs, with_gradients
from tests.lifespans.gate_strategies import gates, selections, two_sequences
from tests.lowerings.uncompiled_flex import flex_with_gradients

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
]


def plain_gather(*tensors, **options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gather_module, "is_fusible", lambda *call: False)
        return gather(*tensors, **options)


LOWERINGS: dict[str, Any] = {
    "fused": gather,
    "plain": plain_gather,
    "flex": flex_with_gradients,
    "dense": partial(dynamic_mask_attention, lowering="dense"),
}


def with_bias(attend: Any) -> Any:
    """A function of query, key, value, gate and bias; or without a gate of query, key, value and bias."""

    def call(query, key, value, *gate_and_bias, **options):
        *gate, bias = gate_and_bias
        return attend(query, key, value, *(gate or [None]), bias=bias, **options)

    return call


def falling_or_rising(heads, keys, slopes):
    """Biases [1, heads, keys] of `slopes` logits per position."""
    return (torch.tensor(slopes)[:heads, None].double() * torch.arange(keys))[None]


MASK = torch.arange(60) >= torch.tensor([[0], [20]])
DOCUMENTS = torch.stack([torch.arange(60) // 25, torch.arange(60) // 60])
CASES: dict[str, dict[str, Any]] = {
    "causal": {"window_size": 7, "sinks": 1, "recent": 2},
    "padding and documents": {"window_size": [3, 9], "key_padding_mask": MASK, "document_ids": DOCUMENTS},
    "global": {"window_size": 20, "selection": "global"},
    "threshold": {"window_size": None, "selection": "threshold"},
    "threshold, window and learned sinks": {
        "window_size": 7,
        "selection": "threshold",
        "sink_logits": torch.linspace(-1, 2, 4, dtype=torch.float64),
    },
    "sliding without gates": {"window_size": 7, "selection": "sliding", "sink_logits": torch.zeros(4).double()},
    "full without gates": {"window_size": None, "selection": "full", "document_ids": DOCUMENTS},
}


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", CASES)
def test_every_lowering_has_the_gradients_of_the_specification(name, lowering):
    *tensors, gate = inputs(2, 4, 2, 45, 60, 8)
    gate = [] if "without gates" in name else [gate]
    # The best sum of gate and bias leaves with its key in the first head, and is the newest key's in the second.
    bias = falling_or_rising(2, 60, [-0.5, 0.25]) + torch.randn(2, 2, 60).double()
    tensors = [*tensors, *gate, bias]
    got = with_gradients(with_bias(LOWERINGS[lowering]), tensors, **CASES[name])
    want = with_gradients(with_bias(dense_dynamic_mask_attention), tensors, **CASES[name])
    for a, b in zip(got, want, strict=True):  # flex subtracts biases in float32
        tolerance = 1e-5 if lowering == "flex" else 1e-7
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    if lowering in ("fused", "plain"):
        with torch.no_grad():
            torch.testing.assert_close(with_bias(LOWERINGS[lowering])(*tensors, **CASES[name]), want[0])


SPECIAL = st.sampled_from([-torch.inf, torch.inf, torch.nan, 0.0, 1.0, -1e6])


@settings(max_examples=40)
@given(gates(max_length=30), st.integers(1, 12), st.sampled_from([gather, plain_gather]), st.data())
def test_any_gates_and_biases(gate, window, attend, data):
    """Ties, infinities and NaN in both; slopes at positions near a million."""
    length = gate.shape[2]
    options = {**data.draw(selections(length)), "window_size": window, "block_size": 8}
    options["selection"] = data.draw(st.sampled_from(["causal", "global", "threshold", "sliding"]))
    *tensors, gate = two_sequences(gate, options)
    bias = falling_or_rising(2, length, data.draw(st.sampled_from([[1e6, 0.5], [-1e6, 0.0], [0.1, -0.1]])))
    bias = bias.expand(2, -1, -1)[:, : data.draw(st.integers(1, gate.shape[1]))].clone()
    if data.draw(st.booleans()):
        bias[0, 0] = torch.tensor(data.draw(st.lists(SPECIAL, min_size=length, max_size=length)))
    arguments = [*tensors, gate, bias]
    del options["block_size"]
    want = with_gradients(with_bias(dense_dynamic_mask_attention), arguments, **options)
    got = with_gradients(with_bias(attend), arguments, block_size=8, **options)
    torch.testing.assert_close(got[0], want[0], atol=1e-8, rtol=1e-8, equal_nan=True)
    if want[0].isfinite().all():
        for a, b in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_bias_chooses_no_key(lowering):
    """With one visible key its value is the output, whatever the bias."""
    *tensors, gate = inputs(1, 2, 1, 30, 30, 8)
    bias = falling_or_rising(1, 30, [1e3])
    got = with_bias(LOWERINGS[lowering])(*tensors, gate, bias, window_size=1)
    torch.testing.assert_close(got, with_bias(dense_dynamic_mask_attention)(*tensors, gate, None, window_size=1))


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_minus_infinity_is_a_weight_of_zero_in_its_place_of_the_window(lowering):
    *tensors, gate = inputs(1, 2, 1, 30, 30, 8)
    bias = torch.zeros(1, 1, 30).double()
    bias[..., :4] = -torch.inf  # queries 0 to 3 see no other key
    options: dict[str, Any] = {"window_size": 5, "sinks": 1}
    got = with_gradients(with_bias(LOWERINGS[lowering]), [*tensors, gate, bias], **options)
    want = with_gradients(with_bias(dense_dynamic_mask_attention), [*tensors, gate, bias], **options)
    assert (got[0][:, :, :4] == 0).all()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_biases_that_grow_cost_no_precision(lowering):
    """float32 inputs, and biases in float64 of a slope at positions from a million on."""
    *tensors, gate = inputs(1, 2, 2, 64, 64, 8, dtype=torch.float32)
    bias = falling_or_rising(2, 64, [0.5, -3e2]) + torch.tensor([0.5e6, -3e8]).double()[:, None]
    tensors = [*tensors, gate, bias]
    got = with_bias(LOWERINGS[lowering])(*tensors, window_size=9)
    exact = with_bias(dense_dynamic_mask_attention)(*(t.double() for t in tensors), window_size=9)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


def test_sums_of_low_precision_are_in_float32():
    *tensors, gate = inputs(1, 2, 2, 40, 40, 8, dtype=torch.float32)
    tensors = [*tensors, gate.bfloat16(), (100 + torch.randn(1, 2, 40)).bfloat16()]
    got = with_bias(dynamic_mask_attention)(*tensors, window_size=9)
    exact = with_bias(dense_dynamic_mask_attention)(*(t.double() for t in tensors), window_size=9)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_under_autocast_a_bias_is_not_cast(training):
    *tensors, gate = inputs(1, 2, 2, 40, 40, 8, dtype=torch.float32)
    bias = falling_or_rising(2, 40, [1.0, -1.0]) + 1e6
    options: dict[str, Any] = {"window_size": 9, "recent": 2}
    attend = with_bias(dynamic_mask_attention)

    def under_autocast(*t):
        with torch.autocast("cpu", torch.bfloat16):
            return attend(*t, **options)

    def by_hand(query, key, value, *others):
        return attend(*(t.bfloat16() for t in (query, key, value)), *others, **options)

    run = with_gradients if training else (lambda function, t: [function(*t)])
    for a, b in zip(*(run(f, [*tensors, gate, bias]) for f in (under_autocast, by_hand)), strict=True):
        assert torch.equal(a, b)


def test_inside_torch_func():
    batches = [torch.stack(t) for t in zip(*(samples(seed) for seed in range(3)), strict=True)]
    options: dict[str, Any] = {"window_size": 5, "recent": 1}

    def loss(attend):
        return lambda *tensors: with_bias(attend)(*tensors, **options).square().sum()

    every = (0, 1, 2, 3, 4)
    got = vmap(grad(loss(dynamic_mask_attention), argnums=every))(*batches)
    for n in range(3):
        want = grad(loss(dense_dynamic_mask_attention), argnums=every)(*(t[n] for t in batches))
        torch.testing.assert_close([g[n] for g in got], list(want))
    primals, tangents = ([t[n] for t in batches] for n in (0, 1))
    pushed = [
        jvp(partial(with_bias(attend), **options), tuple(primals), tuple(tangents))
        for attend in (dynamic_mask_attention, dense_dynamic_mask_attention)
    ]
    torch.testing.assert_close(*pushed)


def samples(seed):
    """Query, key, value, gate and a bias [B, 1, K]."""
    return [*inputs(2, 4, 2, 20, 20, 4, seed=seed), inputs(2, 1, 1, 20, 20, 4, seed=seed + 9)[3]]


@pytest.mark.parametrize("training", [True, False])
def test_compiles_twice_for_changing_lengths(training):
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(partial(with_bias(dynamic_mask_attention), window_size=6), fullgraph=True, backend=counter)
    for length in (51, 300, 9, 129):
        tensors = [*inputs(1, 4, 2, length, length, 8, seed=length), falling_or_rising(2, length, [0.5, -0.1])]
        specification = partial(with_bias(dense_dynamic_mask_attention), window_size=6)
        run = with_gradients if training else (lambda function, t: [function(*t)])
        with torch.set_grad_enabled(training):
            for a, b in zip(run(attend, tensors), run(specification, tensors), strict=True):
                torch.testing.assert_close(a, b)
    assert counter.frame_count == 2  # the first length, others


@pytest.mark.slow
def test_by_the_compiled_kernel_of_flexattention():
    *tensors, gate = inputs(1, 4, 2, 300, 300, 16, dtype=torch.float32)
    bias = falling_or_rising(2, 300, [0.5, -0.3]) + 1e5
    tensors = [*tensors, gate, bias]
    got = with_bias(dynamic_mask_attention)(*tensors, window_size=20, recent=4, lowering="flex")
    want = with_bias(dense_dynamic_mask_attention)(*(t.double() for t in tensors), window_size=20, recent=4)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_packed_sequences_equal_each_alone():
    lengths, tensors = [5, 0, 12, 1], [*inputs(1, 4, 2, 18, 18, 8), inputs(1, 1, 1, 18, 18, 8)[3] * 3]
    ends = torch.tensor([0, *lengths]).cumsum(0)

    def packed(*tensors):
        rows = [t[0].transpose(0, 1) for t in tensors]  # [T, H, ...]
        attend = partial(dynamic_mask_attention_varlen, bias=rows.pop(), window_size=3, sinks=1)
        return attend(*rows, ends).transpose(0, 1)[None]

    def apart(*tensors):
        parts = zip(*(t.split(lengths, 2) for t in tensors), strict=True)
        return torch.cat(
            [
                with_bias(dense_dynamic_mask_attention)(*part, window_size=3, sinks=1)
                for part in parts
                if part[0].numel()
            ],
            2,
        )

    for a, b in zip(with_gradients(packed, tensors), with_gradients(apart, tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_wrong_biases_are_named():
    tensors = inputs(2, 4, 2, 8, 8, 16)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (torch.zeros(2, 4, 8), ValueError, r"bias: expected \[2, 2, 8\], got \[2, 4, 8\]"),
        (torch.zeros(2, 2, 8).long(), TypeError, "bias: expected a floating point dtype, got torch.int64"),
        (3.0, TypeError, r"bias: expected a tensor \[2, 2, 8\], got float"),
    ]
    for bias, error, message in wrong:
        for attend in (dynamic_mask_attention, dense_dynamic_mask_attention):
            with pytest.raises(error, match=message):
                with_bias(attend)(*tensors, bias, window_size=3)
    rows = [t[0].transpose(0, 1) for t in tensors]
    packed: Any = partial(dynamic_mask_attention_varlen, *rows, torch.tensor([0, 8]), window_size=3)
    with pytest.raises(ValueError, match=r"bias: expected \[8, 2\], got \[2, 8\]"):
        packed(bias=torch.zeros(2, 8))
