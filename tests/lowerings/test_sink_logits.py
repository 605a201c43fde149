"""Learned sinks compared with the specification, with finite differences and with GPT-OSS's own formula."""

from typing import Any

import pytest
import torch

from flexdma import dynamic_mask_attention
from flexdma.lowerings.gate_gradient import ROUTES, gate_gradient_route
from flexdma.reference import dense_dynamic_mask_attention
from flexdma.score_mods import softcap_score_mod
from tests.comparison import gather, inputs, with_gradients
from tests.lowerings.uncompiled_flex import flex_with_gradients
from tests.state.test_state_equality import run
from tests.test_operator import left_padding

W = 20


def sink_logits():
    return torch.tensor([0.5, -1.0, 2.0, -torch.inf], dtype=torch.float64, requires_grad=True)


def assert_same_with_sinks(attend, tensors, *, tolerance, **options):
    sink = sink_logits()
    got = with_gradients(attend, tensors, sink, sink_logits=sink, **{"window_size": W, **options})
    exact = [tensor.double() for tensor in tensors]
    want = with_gradients(dense_dynamic_mask_attention, exact, sink, sink_logits=sink, **{"window_size": W, **options})
    for name, a, b in zip(("output", "query", "key", "value", "gate", "sink_logits"), got, want, strict=True):
        error = (a.double() - b).abs().max().item()
        assert error <= tolerance * max(1.0, b.abs().max().item()), f"{name}: error {error}"


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "sinks and recent": {"sinks": 2, "recent": 5},
    "global": {"selection": "global"},
    "threshold": {"selection": "threshold", "window_size": None},
    "documents and padding": {"document_ids": torch.arange(129).expand(2, -1) // 50, "key_padding_mask": left_padding},
    "softcap": {"score_mod": softcap_score_mod(2.0)},
}


def test_zeros_of_both_signs_are_equal_gates():
    query, key, value, gate = inputs(1, 4, 2, 2, 2, 8)
    gate = torch.zeros_like(gate)
    gate[..., 1] = -0.0
    assert_same_with_sinks(gather, (query, key, value, gate.requires_grad_()), tolerance=1e-12)


@pytest.mark.parametrize("queries", [129, 45])
@pytest.mark.parametrize("name", OPTIONS)
def test_gather_equals_the_specification(name, queries):
    assert_same_with_sinks(gather, inputs(2, 4, 2, queries, 129, 16), tolerance=1e-12, **OPTIONS[name])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["causal", "documents and padding"])
def test_flex_equals_the_specification_by_every_route(route, name):
    with gate_gradient_route(route):
        assert_same_with_sinks(flex_with_gradients, inputs(2, 4, 2, 45, 129, 16), tolerance=1e-6, **OPTIONS[name])


@pytest.mark.parametrize("attend", [gather, dense_dynamic_mask_attention])
def test_gradients_by_finite_differences(attend):
    tensors = [t.requires_grad_() for t in [*inputs(1, 2, 1, 4, 5, 2, 1), torch.randn(2).double()]]
    tensors[3].data += 1e-3 * torch.arange(5)  # no ties, because a best gate among equals has no derivative

    def function(*tensors):
        return attend(*tensors[:4], sink_logits=tensors[4], window_size=3)

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("constant", [0.0, 7.0, -1000.0])
def test_constant_gates_leave_the_formula_of_gpt_oss(constant):
    query, key, value, gate = inputs(1, 4, 4, 30, 30, 8)
    sink = sink_logits()
    scores = (query @ key.mT * 8**-0.5).masked_fill(torch.ones(30, 30).triu(1).bool(), -torch.inf)
    weights = torch.cat([scores, sink.view(4, 1, 1).expand(1, 4, 30, 1)], -1).softmax(-1)
    got = gather(query, key, value, torch.full_like(gate, constant), window_size=30, sink_logits=sink)
    torch.testing.assert_close(got, weights[..., :-1] @ value)


def test_a_constant_added_to_all_gates_changes_nothing():
    tensors, sink = inputs(1, 4, 2, 60, 60, 8), sink_logits()
    got = with_gradients(gather, tensors, sink, sink_logits=sink, window_size=W)
    shifted = [*tensors[:3], tensors[3] + 100]
    for a, b in zip(got, with_gradients(gather, shifted, sink, sink_logits=sink, window_size=W), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(got[4].sum(-1), torch.zeros(1, 2).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [{}, {"sinks": 2, "recent": 3}, {"selection": "threshold"}])
@pytest.mark.parametrize("sizes", [[60], [1] * 60, [17, 1, 1, 30, 11]])
def test_chunks_and_single_tokens_are_one_pass(options, sizes):
    tensors, sink = inputs(2, 4, 2, 60, 60, 8), sink_logits()
    want = with_gradients(dense_dynamic_mask_attention, tensors, sink, sink_logits=sink, window_size=7, **options)

    def attend(*tensors, **options):
        return run(tensors, sizes, **options)[0]

    got = with_gradients(attend, tensors, sink, sink_logits=sink, window_size=7, **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@torch.no_grad()
def test_the_best_gate_is_the_best_where_float32_cannot_tell():
    query, key, value, gate = inputs(1, 4, 2, 60, 60, 8)
    gate = 2.0**25 + gate.sort(-1, descending=True).values  # float32 rounds these to a multiple of 4
    options = {"window_size": W, "sink_logits": sink_logits()}
    want = dense_dynamic_mask_attention(query, key, value, gate - 2.0**25, **options)
    torch.testing.assert_close(gather(query, key, value, gate, **options), want, atol=1e-7, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_inference_in_lower_precision(dtype):
    tensors = inputs(2, 4, 2, 129, 129, 16, dtype=dtype)
    want = dense_dynamic_mask_attention(*(t.double() for t in tensors), window_size=W, sink_logits=sink_logits())
    got = gather(*tensors, window_size=W, sink_logits=sink_logits().to(dtype))
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


def test_no_rows_and_no_numbers():
    for device, batch in (("cpu", 0), ("meta", 2)):
        tensors = [t.expand(batch, *t.shape[1:]) for t in inputs(1, 4, 2, 7, 9, 8, dtype=torch.bfloat16)]
        tensors = [t.to(device).requires_grad_() for t in [*tensors, torch.zeros(4)]]
        output = dynamic_mask_attention(*tensors[:4], window_size=3, sink_logits=tensors[4])
        output.sum().backward()
        assert output.shape == (batch, 4, 7, 8)
        assert all(t.grad.shape == t.shape for t in tensors)


def test_compiled_calls_are_one_graph():
    tensors, sink = inputs(1, 4, 2, 60, 60, 8), sink_logits()
    compiled = torch.compile(gather, fullgraph=True, backend="aot_eager")
    options = {"sink_logits": sink, "window_size": W}
    want = with_gradients(gather, tensors, sink, **options)
    for a, b in zip(with_gradients(compiled, tensors, sink, **options), want, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*tensors, **options), want[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sink_logits": torch.zeros(2)}, ValueError, r"sink_logits: expected \[4\], got \[2\]"),
        ({"sink_logits": 0.0}, TypeError, r"sink_logits: expected a tensor \[4\], got float"),
        (
            {"sink_logits": torch.zeros(4).int()},
            TypeError,
            "sink_logits: expected a floating point dtype, got torch.int32",
        ),
        (
            {"recent": 2, "selection": "global"},
            ValueError,
            "recent: expected 0 with sink_logits and selection='global', as the best gate may be a recent one, got 2",
        ),
        (
            {"lowering": "flex"},
            ValueError,
            "lowering: 'flex' has no log-sum-exp on a CPU; expected 'gather' or 'dense'",
        ),
    ],
)
def test_what_is_refused(options, error, message):
    tensors = inputs(1, 4, 2, 30, 30, 8, dtype=torch.float32)
    with pytest.raises(error, match=message):
        dynamic_mask_attention(*tensors, **{"window_size": 5, "sink_logits": torch.zeros(4), **options})
