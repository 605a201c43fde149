"""One pass = chunks of any sizes = token by token: outputs, states and gradients."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from flexdma import DynamicMaskAttention, dynamic_mask_attention
from tests.comparison import inputs
from tests.lifespans.gate_strategies import gates, selections, two_sequences


def run(
    tensors, sizes, *, state=None, detached=False, donate=False, key_padding_mask=None, document_ids=None, **options
):
    """Outputs of consecutive chunks of these sizes, and the state after them."""
    outputs, start = [], 0
    for size in sizes:
        chunk = [t[:, :, start : start + size] for t in tensors]
        masks = {"key_padding_mask": key_padding_mask, "document_ids": document_ids}
        masks = {name: None if mask is None else mask[:, start : start + size] for name, mask in masks.items()}
        output, state = dynamic_mask_attention(
            *chunk, state=state, return_state=True, donate=donate and state is not None, **(masks | options)
        )
        state = state.detach() if detached else state
        outputs.append(output)
        start += size
    return torch.cat(outputs, 2), state


def assert_same_states(a, b):
    """The same keys in any slots, empty slots blank, and all other tensors equal."""
    found = []
    for state in (a, b):
        position, order = state.position.sort(-1)
        empty = position < 0
        gate = state.gate.gather(-1, order)
        key, value = (t.gather(2, order[..., None].expand_as(t)) for t in (state.key, state.value))
        assert (gate[empty] == -torch.inf).all()
        assert (key[empty] == 0).all()
        assert (value[empty] == 0).all()
        found.append([position, gate, key, value, state.length, state.document, state.last_sink, state.last_loss])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0, atol=0)


@st.composite
def splits(draw, length):
    """Sizes of consecutive chunks that add up to the length; often single tokens."""
    sizes: list[int] = []
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
    options["selection"] = data.draw(st.sampled_from(["causal", "threshold", "sliding"]))
    tensors = two_sequences(gate, options)
    whole = dynamic_mask_attention(*tensors, lowering="dense", **options)
    split, state = run(tensors, data.draw(splits(length)), **options)
    torch.testing.assert_close(split, whole, equal_nan=True, rtol=1e-9, atol=1e-9)
    assert_same_states(state, run(tensors, [length], **options)[1])
    tokens, state_by_tokens = run(tensors, [1] * length, donate=data.draw(st.booleans()), **options)
    torch.testing.assert_close(tokens, whole, equal_nan=True, rtol=1e-9, atol=1e-9)
    assert_same_states(state, state_by_tokens)


@given(gates(max_length=20), st.data())
def test_crop_is_the_prefix_or_refused(gate, data):
    length, heads = gate.shape[-1], gate.shape[1]
    options: dict[str, Any] = data.draw(selections(length)) | {"window_size": data.draw(st.integers(1, 30))}
    masks: dict[str, Any] = {
        name: options.pop(name) for name in ("key_padding_mask", "document_ids") if name in options
    }
    # The specification adds gates without a reference, so its rounding error grows with the gate.
    gate = torch.where(gate == -torch.inf, gate, gate.clamp(-1e3, 1e3)).double()
    tensors: Any = (*inputs(1, 2, heads, length, length, 2)[:3], gate)
    _, state = run(tensors, data.draw(splits(length)), **options, **masks)
    kept = data.draw(st.integers(0, length))
    lost = bool((state.last_loss >= kept).any())
    if kept in (0, length):
        lost = False
    if lost:
        with pytest.raises(ValueError, match="evicted keys are gone"):
            state.crop(length - kept)
        return
    padded = "key_padding_mask" in masks and not masks["key_padding_mask"][:, kept:].all()
    if padded and kept not in (0, length):
        with pytest.raises(ValueError, match="the number of real tokens before it is not kept"):
            state.crop(length - kept)
        return
    cropped = state.crop(torch.tensor([length - kept]))
    if kept == 0:
        assert (cropped.position == -1).all()
        return
    _, prefix = run([t[:, :, :kept] for t in tensors], [kept], **options,
                    **{name: mask[:, :kept] for name, mask in masks.items()})  # fmt: skip
    # Without keys the document does not matter.
    document = prefix.document if (prefix.position < 0).all() else cropped.document
    assert_same_states(replace(cropped, last_loss=prefix.last_loss, document=document), prefix)
    if kept == length:
        return
    rest = {name: mask[:, kept:] for name, mask in masks.items()}
    sizes = data.draw(splits(length - kept))
    after, again = run([t[:, :, kept:] for t in tensors], sizes, state=cropped, **options, **rest)
    whole = dynamic_mask_attention(*tensors, lowering="dense", **(options | masks))
    torch.testing.assert_close(after, whole[:, :, kept:], equal_nan=True, rtol=1e-9, atol=1e-9)
    assert_same_states(replace(again, last_loss=state.last_loss), state)


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
    """They equal one pass in which the keys of earlier chunks are constants."""
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
    """A left-padded row decodes as it does alone and without padding."""
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
def test_score_mods_see_no_position_that_does_not_exist(lowering):
    """A table by distance is not read beyond its end, even with an empty state."""
    table = torch.randn(6, dtype=torch.float64)
    tensors = inputs(1, 4, 2, 6, 6, 4)
    options: dict[str, Any] = {
        "window_size": 8,
        "recent": 3,
        "score_mod": lambda score, b, h, i, j: score + table[(i - j).clamp(min=0)],
    }
    whole = dynamic_mask_attention(*tensors, lowering="dense", **options)
    split, _state = run(tensors, [2, 3, 1], lowering=lowering, **options)
    torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-9)


def test_documents_of_any_integer_dtype_and_no_trace_of_the_last_one():
    tensors = inputs(1, 4, 2, 8, 8, 4)
    tensors[1][:, :, 1] = torch.nan
    ids = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32)
    output, _state = run(tensors, [1] * 8, window_size=6, document_ids=ids)
    assert output[:, :, 1:3].isnan().all()
    assert not output[:, :, 3:].isnan().any()


def test_gradients_through_rows_that_move():
    """Reorder, put, checkpoint and crop pass gradients on."""
    leaves = [t.requires_grad_() for t in inputs(2, 4, 2, 12, 12, 4)]
    flipped = [t.flip(0) for t in leaves]
    whole = dynamic_mask_attention(*flipped, window_size=20, lowering="dense")[:, :, 9:]
    _, state = run([t[:, :, :10] for t in leaves], [10], window_size=20)
    state = state.crop(1).reorder(torch.tensor([1, 0])).checkpoint()
    state = state.put(torch.tensor([1]), state.reorder(torch.tensor([1])))
    split = dynamic_mask_attention(*(t[:, :, 9:] for t in flipped), window_size=20, state=state)
    for got, want in zip(gradients(split, leaves), gradients(whole, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lowering", [None, "gather", "dense"])
def test_score_mods_are_told_positions(lowering):
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)

    def alibi(score, b, h, i, j):
        return score + slopes[h] * (j - i) + 0.01 * b * (h + 1) * (i % 3) * (j % 5)

    tensors = inputs(2, 4, 2, 30, 30, 4)
    options: dict[str, Any] = {"window_size": 6, "sinks": 1, "recent": 2, "score_mod": alibi}
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


@pytest.mark.parametrize("recency", ["slope", "forget"])
def test_a_state_at_a_million_is_as_precise_as_at_a_thousand(recency):
    torch.manual_seed(3)
    layer = DynamicMaskAttention(32, 4, 2, 8, 6, recency=recency)
    hidden, outputs = torch.randn(1, 20, 32), []
    with torch.no_grad():
        for offset in (1_000, 1_000_000):
            state = replace(
                layer.empty_state(1), length=torch.tensor([offset]), forgotten=torch.full((1, 2), offset / 20.0)
            )
            state = replace(state, forgotten=state.forgotten.double())
            first, state = layer(hidden[:, :15], state=state, return_state=True)
            steps = []
            for token in range(15, 20):
                step, state = layer(hidden[:, token : token + 1], state=state, return_state=True)
                steps.append(step)
            outputs.append(torch.cat([first, *steps], 1))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


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


@pytest.mark.slow
def test_decoding_compiles_once_and_chunks_through_flex():
    """Static shapes: no recompilation as the context grows, and eager's numbers; the flex kernel supports a state too."""
    torch._dynamo.reset()
    tensors = inputs(2, 4, 2, 96, 96, 8, dtype=torch.float32)
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def score_mod(score, b, h, i, j):
        return score + slopes[h] * (j - i)

    options: dict[str, Any] = {"window_size": 16, "sinks": 1, "recent": 2, "score_mod": score_mod}
    with torch.no_grad():
        whole = dynamic_mask_attention(*tensors, lowering="dense", **options)
        counter = CompileCounterWithBackend("inductor")
        step: Any = torch.compile(dynamic_mask_attention, fullgraph=True, backend=counter)
        output, state = step(*(t[:, :, :64] for t in tensors), return_state=True, lowering="flex", **options)
        torch.testing.assert_close(output, whole[:, :, :64], rtol=1e-4, atol=1e-5)
        outputs = []
        for start in range(64, 80):
            chunk = [t[:, :, start : start + 1] for t in tensors]
            output, state = step(*chunk, state=state, return_state=True, **options)
            outputs.append(output)
        assert counter.frame_count == 2
        torch.testing.assert_close(torch.cat(outputs, 2), whole[:, :, 64:80], rtol=1e-4, atol=1e-5)
        rest = [t[:, :, 80:] for t in tensors]
        output, state = step(*rest, state=state, return_state=True, lowering="flex", **options)
        torch.testing.assert_close(output, whole[:, :, 80:], rtol=1e-4, atol=1e-5)
        # One compilation for prefill, one for decoding, and one for chunks of another size.
        assert counter.frame_count == 3
        assert_same_states(state, run(tensors, [96], **options)[1])
