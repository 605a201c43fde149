"""The gate's gradient by each route, compared with the dense specification; and without atomics where requested."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexdma import dynamic_mask_attention
from flexdma.lowerings import fused_blocks, gate_gradient
from flexdma.lowerings.gate_gradient import ROUTES, chosen_route, gate_gradient_route
from flexdma.reference import dense_dynamic_mask_attention, dense_visibility
from flexdma.score_mods import alibi_score_mod
from tests.comparison import assert_same, gather, inputs, with_gradients
from tests.lifespans.gate_strategies import selections
from tests.lowerings.uncompiled_flex import flex_with_gradients
from tests.test_operator import VARIANTS

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor"),
]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@given(st.integers(1, 30), st.integers(1, 9), st.data())
@settings(max_examples=30)
def test_the_identity_holds_for_any_mask(keys, window, data):
    """d gate_j = dV_j . (v_j - c) - sum_i P_ij dO_i . (o_i - c) for any c, also with rows that see no key."""
    options = data.draw(selections(keys))
    queries = data.draw(st.integers(1, keys))
    tensors = inputs(1, 2, 2, queries, keys, 4, seed=keys)
    query, key, value, gate = tensors
    output, _, _, dv, dgate = with_gradients(dense_dynamic_mask_attention, tensors, window_size=window, **options)
    visible = dense_visibility(gate, window_size=window, **options)[:, :, keys - queries :]
    scores = (query @ key.mT / 2 + gate[:, :, None]).masked_fill(~visible, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    centre = torch.randn(1, 2, 1, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = (dv * (value - centre)).sum(-1) - (weights.mT @ (cotangent * (output - centre)).sum(-1, keepdim=True))[..., 0]
    torch.testing.assert_close(got, dgate, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ["causal", "left padding", "documents", "scale"])
@pytest.mark.parametrize("route", ROUTES)
def test_every_route_equals_the_specification(route, name):
    with gate_gradient_route(route):
        # This lowering subtracts gates in float32; the rest of this test is in float64.
        assert_same(flex_with_gradients, inputs(2, 4, 2, 45, 129, 16), tolerance=1e-6, window_size=20, **VARIANTS[name])


@pytest.mark.parametrize("route", ROUTES)
def test_a_row_that_sees_nothing_or_is_hidden_by_a_score_mod(route):
    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx < 30, -torch.inf, score)

    tensors = inputs(1, 2, 1, 100, 100, 16)
    mask = (torch.arange(100) >= 20)[None]
    with gate_gradient_route(route):
        assert_same(flex_with_gradients, tensors, tolerance=1e-6, window_size=20, key_padding_mask=mask)
        assert_same(flex_with_gradients, tensors, tolerance=1e-6, window_size=20, score_mod=score_mod)


def test_what_a_score_mod_captures_is_trained_beside_the_gate():
    tensors, slopes = inputs(1, 4, 2, 45, 100, 16), torch.rand(4, dtype=torch.float64, requires_grad=True)
    options = {"window_size": 20, "score_mod": alibi_score_mod(slopes)}
    got = with_gradients(flex_with_gradients, tensors, slopes, **options)
    want = with_gradients(dense_dynamic_mask_attention, tensors, slopes, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_numbers_of_the_transposed_pass_keep_their_low_part(dtype):
    numbers = torch.randn(2, 3, 50) * (1e5 if dtype == torch.float16 else 1.0)
    values, unit = gate_gradient.as_values(numbers, dtype)
    assert values.shape == (2, 3, 50, gate_gradient.COLUMNS)
    assert values.isfinite().all()
    error = (values.double().sum(-1) * unit - numbers.double()).abs().max()
    assert error <= numbers.abs().max() * torch.finfo(dtype).eps ** 2


def test_the_mean_value_leaves_out_what_is_not_finite():
    value = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan, 9.0]).view(1, 1, 5, 1)
    assert gate_gradient.mean_value(value.bfloat16()).tolist() == [[[[2.0]]]]


def test_a_hidden_value_that_is_not_finite_stays_out_of_the_gates_gradient():
    tensors = inputs(1, 2, 1, 100, 100, 16)
    mask = (torch.arange(100) >= 20)[None]
    tensors[2][:, :, :20] = torch.inf
    *_, got = with_gradients(flex_with_gradients, tensors, window_size=20, key_padding_mask=mask)
    assert got.isfinite().all()


def test_deterministic_algorithms_take_no_atomics(deterministic):
    with gate_gradient_route("atomics"):
        assert chosen_route(True, False) == "transposed"
    assert (
        torch.compile(lambda x: x + len(chosen_route(True, False)), fullgraph=True, backend="eager")(0 * torch.ones(1))
        == 10
    )


def test_sizes_that_are_not_known_take_no_atomics():
    """Inductor cannot compile the gradient of a captured tensor of symbolic size."""

    def number(x):
        return x.new_full((), ROUTES.index(chosen_route(True, False, x.shape)))

    for dynamic, route in ((False, "atomics"), (True, "transposed")):
        torch._dynamo.reset()
        compiled = torch.compile(number, fullgraph=True, backend="eager", dynamic=dynamic)
        with gate_gradient_route("atomics"):
            assert ROUTES[int(compiled(torch.ones(3, 7)))] == route


@pytest.mark.parametrize("size", [16, 20])
def test_zeros_that_fill_rows_change_no_gradient(size, monkeypatch):
    tensors = [torch.randn(1, heads, 40, size, requires_grad=True) for heads in (4, 2, 2)]
    tensors.append(torch.randn(1, 2, 40, requires_grad=True))
    found = []
    for aligned in (1, 8):
        monkeypatch.setattr(fused_blocks, "ALIGNED", aligned)
        output = dynamic_mask_attention(*tensors, window_size=8, lowering="gather")
        found.append(torch.autograd.grad(output.square().sum(), tensors))
    want = torch.autograd.grad(dense_dynamic_mask_attention(*tensors, window_size=8).square().sum(), tensors)
    for narrow, filled, expected in zip(*found, want, strict=True):
        torch.testing.assert_close(narrow, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(filled, expected, rtol=1e-4, atol=1e-5)


def test_an_unknown_route_is_named():
    with pytest.raises(ValueError, match="route: expected one of 'transposed', 'atomics', 'column', got 'fast'"):
        gate_gradient_route("fast").__enter__()


def test_gather_under_deterministic_algorithms_is_the_same_every_time(deterministic):
    tensors = inputs(2, 4, 2, 300, 300, 16, dtype=torch.float32)
    first, second = (with_gradients(gather, tensors, window_size=20, sinks=1, recent=3) for _ in range(2))
    assert all(map(torch.equal, first, second))
