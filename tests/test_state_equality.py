"""One pass = chunks of any sizes = token by token: outputs, states and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from flexdma import DynamicMaskAttention, dynamic_mask_attention
from tests.comparison import inputs
from tests.gate_strategies import gates, selections


def run(tensors, sizes, *, state=None, detached=False, key_padding_mask=None, document_ids=None, **options):
    """Outputs of consecutive chunks of these sizes, and the state after them."""
    outputs, start = [], 0
    for size in sizes:
        chunk = [t[:, :, start : start + size] for t in tensors]
        masks = {"key_padding_mask": key_padding_mask, "document_ids": document_ids}
        masks = {name: None if mask is None else mask[:, start : start + size] for name, mask in masks.items()}
        output, state = dynamic_mask_attention(*chunk, state=state, return_state=True, **masks, **options)
        state = state.detach() if detached else state
        outputs.append(output)
        start += size
    return torch.cat(outputs, 2), state


def held(state):
    """The positions that each row and head holds, as sets."""
    return [[set(row[row >= 0].tolist()) for row in rows] for rows in state.position]


@st.composite
def splits(draw, length):
    """Sizes of consecutive chunks that make up the length; often single tokens."""
    sizes = []
    while sum(sizes) < length:
        sizes.append(
            draw(st.sampled_from([1, 1, 1, 2, 5, 17])) if draw(st.booleans()) else draw(st.integers(1, length))
        )
        sizes[-1] = min(sizes[-1], length - sum(sizes[:-1]))
    return sizes


@given(gates(), st.data())
def test_any_split_is_one_pass(gate, data):
    length, heads = gate.shape[-1], gate.shape[1]
    options = data.draw(selections(length))
    options["window_size"] = data.draw(st.integers(1, 6))
    if heads == 2 and data.draw(st.booleans()):
        options["window_size"] = [options["window_size"], data.draw(st.integers(1, 6))]
    options["selection"] = data.draw(st.sampled_from(["causal", "threshold"]))
    query, key, value, _gate = inputs(1, 4, heads, length, length, 4)
    # The specification adds a gate as it is, so its own rounding grows with the gate.
    gate = torch.where(gate == -torch.inf, gate, gate.clamp(-1e3, 1e3)).double()
    tensors = (query, key, value, gate)
    whole = dynamic_mask_attention(*tensors, lowering="dense", **options)
    split, state = run(tensors, data.draw(splits(length)), **options)
    torch.testing.assert_close(split, whole, equal_nan=True, rtol=1e-9, atol=1e-9)
    assert held(state) == held(run(tensors, [length], **options)[1])
    assert held(state) == held(run(tensors, [1] * length, **options)[1])


def gradients(output, leaves):
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return torch.autograd.grad(output, leaves, cotangent)


@pytest.mark.parametrize("options", [{}, {"sinks": 2, "recent": 3}])
@pytest.mark.parametrize("sizes", [[30], [7, 1, 12, 10], [1] * 30])
def test_gradients_through_an_attached_state(sizes, options):
    leaves = [t.requires_grad_() for t in inputs(2, 4, 2, 30, 30, 4)]
    whole = dynamic_mask_attention(*leaves, window_size=6, lowering="dense", **options)
    split, _state = run(leaves, sizes, window_size=6, **options)
    for got, want in zip(gradients(split, leaves), gradients(whole, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sizes", [[7, 1, 12, 10], [1] * 30])
def test_gradients_through_a_detached_state_stop_at_the_chunk(sizes):
    """The same as one pass in which the keys of earlier chunks are constants."""
    leaves = [t.requires_grad_() for t in inputs(1, 4, 2, 30, 30, 4)]
    split, _state = run(leaves, sizes, detached=True, window_size=6)
    outputs, start = [], 0
    for size in sizes:
        constant = [t[:, :, :start].detach() for t in leaves]
        query, *keys = (torch.cat([c, t[:, :, start : start + size]], 2) for c, t in zip(constant, leaves, strict=True))
        outputs.append(dynamic_mask_attention(query[:, :, start:], *keys, window_size=6, lowering="dense"))
        start += size
    for got, want in zip(gradients(split, leaves), gradients(torch.cat(outputs, 2), leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**31), st.data())
def test_left_padded_batches(seed, data):
    """A row padded on the left decodes as it does alone, without the padding."""
    batch, length = 3, 24
    query, key, value, gate = inputs(batch, 4, 2, length, length, 4, seed=seed)
    padding = [data.draw(st.integers(0, length - 1)) for _ in range(batch)]
    real = torch.arange(length) >= torch.tensor(padding)[:, None]
    key = key.masked_fill(~real[:, None, :, None], torch.nan)
    options = {"window_size": 5, "sinks": data.draw(st.integers(0, 2)), "recent": data.draw(st.integers(0, 2))}
    sizes = data.draw(splits(length))
    together, _state = run((query, key, value, gate), sizes, key_padding_mask=real, **options)
    for row, start in enumerate(padding):
        alone, _state = run(
            [t[row : row + 1, :, start:] for t in (query, key, value, gate)], [length - start], **options
        )
        torch.testing.assert_close(together[row : row + 1, :, start:], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lowering", [None, "gather", "dense"])
def test_score_mods_are_told_positions(lowering):
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def alibi(score, b, h, i, j):
        return score + slopes[h] * (j - i) + 0.01 * b * (h + 1) * (i % 3) * (j % 5)

    tensors = inputs(2, 4, 2, 30, 30, 4)
    options = {"window_size": 6, "sinks": 1, "recent": 2, "score_mod": alibi}
    whole = dynamic_mask_attention(*tensors, lowering="dense", **options)
    split, _state = run(tensors, [11, 1, 1, 9, 8], lowering=lowering, **options)
    torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-9)


def test_fewer_queries_than_new_keys():
    tensors = inputs(1, 4, 2, 30, 30, 4)
    whole = dynamic_mask_attention(*tensors, window_size=6, lowering="dense")
    _, state = run([t[:, :, :10] for t in tensors], [10], window_size=6)
    query, *keys = (t[:, :, 10:] for t in tensors)
    output = dynamic_mask_attention(query[:, :, 15:], *keys, window_size=6, state=state)
    torch.testing.assert_close(output, whole[:, :, 25:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("recency", [None, "slope", "forget"])
def test_layer_in_chunks_is_the_layer(recency):
    torch.manual_seed(3)
    layer = DynamicMaskAttention(32, 4, 2, 8, 6, recency=recency, sinks=1)
    torch.nn.init.normal_(layer.gate.A)
    hidden = torch.randn(2, 40, 32)
    angle = torch.rand(40, 8)
    rotary = (angle.cos(), angle.sin())
    whole = layer(hidden, rotary)
    for sizes in ([13, 1, 26], [1] * 40):
        state, outputs, start = layer.empty_state(2), [], 0
        for size in sizes:
            here = slice(start, start + size)
            output, state = layer(hidden[:, here], tuple(t[here] for t in rotary), state=state, return_state=True)
            outputs.append(output)
            start += size
        torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-5, atol=1e-6)


def test_decoding_compiles_once_and_chunks_through_flex():
    """Static shapes: no recompilation as the context grows, in eager's numbers; the flex kernel takes a state too."""
    torch._dynamo.reset()
    tensors = inputs(2, 4, 2, 96, 96, 8, dtype=torch.float32)
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def score_mod(score, b, h, i, j):
        return score + slopes[h] * (j - i)

    options = {"window_size": 16, "sinks": 1, "recent": 2, "score_mod": score_mod}
    with torch.no_grad():
        whole = dynamic_mask_attention(*tensors, lowering="dense", **options)
        counter = CompileCounterWithBackend("inductor")
        step = torch.compile(dynamic_mask_attention, fullgraph=True, backend=counter)
        output, state = step(*(t[:, :, :64] for t in tensors), return_state=True, **options)
        torch.testing.assert_close(output, whole[:, :, :64], rtol=1e-4, atol=1e-5)
        outputs = []
        for start in range(64, 80):
            chunk = [t[:, :, start : start + 1] for t in tensors]
            output, state = step(*chunk, state=state, return_state=True, **options)
            outputs.append(output)
        assert counter.frame_count == 2
        torch.testing.assert_close(torch.cat(outputs, 2), whole[:, :, 64:80], rtol=1e-4, atol=1e-5)
        output, state = step(*(t[:, :, 80:] for t in tensors), state=state, return_state=True, **options)
        torch.testing.assert_close(output, whole[:, :, 80:], rtol=1e-4, atol=1e-5)
        assert held(state) == held(run(tensors, [96], **options)[1])
