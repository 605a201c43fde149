"""GrowingState: one pass = chunks = tokens for policies without a bound, in slots that follow the number of living keys."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from flexdma import (
    DynamicMaskAttention,
    DynamicMaskState,
    GrowingState,
    dynamic_mask_attention,
    dynamic_mask_attention_varlen,
    growing_attention,
    load_states,
    save_states,
)
from flexdma.reference import dense_dynamic_mask_attention, dense_lifespan_attention, dense_visibility
from tests.comparison import inputs
from tests.lifespans.gate_strategies import gates, selections, two_sequences
from tests.lowerings.uncompiled_flex import attend_uncompiled
from tests.state.test_state_equality import gradients, run, splits

THRESHOLD: dict[str, Any] = {"window_size": None, "selection": "threshold"}


def held(state):
    """What a state holds, with the keys of each head in order of position."""
    keys = []
    for batch in range(state.position.shape[0]):
        for head in range(state.position.shape[1]):
            position = state.position[batch, head]
            order = [slot for slot in position.argsort().tolist() if position[slot] >= 0]
            keys.append(
                [getattr(state, name)[batch, head, order] for name in ("position", "gate", "key", "value", "expiry")]
            )
            assert (state.gate[batch, head, position < 0] == -torch.inf).all()
    rest = [state.length, state.real_length, state.last_padding, state.last_sink, state.last_loss, state.peak]
    return keys, rest


def assert_same_states(a, b):
    torch.testing.assert_close(held(a), held(b), equal_nan=True, rtol=0, atol=0)


def test_literal():
    gate = torch.tensor([[[3.0, -1.0, 2.0, -5.0, 1.0]]])
    key = torch.arange(5.0).view(1, 1, 5, 1)
    _, state = dynamic_mask_attention(key, key, key, gate, sinks=1, recent=2, return_state=True, **THRESHOLD)
    # Keys 0, 2 and 4 are above the threshold, and 3 is recent.  As a recent key, 1 died at 3.
    assert sorted(state.position.flatten().tolist()) == [-1] * 12 + [0, 2, 3, 4]
    assert state.expiry[state.position >= 0].tolist() == [torch.inf, torch.inf, 4.0, torch.inf]
    assert (state.living.tolist(), state.peak.tolist(), state.last_loss.tolist()) == ([[4]], [[4]], [[3]])


@settings(max_examples=25)
@given(gates(), st.data())
def test_any_split_is_one_pass(gate, data):
    length = gate.shape[-1]
    options = data.draw(selections(length)) | THRESHOLD
    if options["recent"] == 0 and data.draw(st.booleans()):
        options["sink_logits"] = torch.tensor([0.5, -1.0, -torch.inf, 2.0]).double()
    if data.draw(st.booleans()):
        options["score_mod"] = lambda score, b, h, i, j: score - 0.1 * (i - j) * (h + 1 + b)
    tensors = two_sequences(gate, options)
    whole = dense_dynamic_mask_attention(*tensors, **options)
    by_chunks, state = run(tensors, data.draw(splits(length)), **options)
    torch.testing.assert_close(by_chunks, whole, equal_nan=True, rtol=1e-9, atol=1e-9)
    by_tokens, state_by_tokens = run(tensors, [1] * length, donate=data.draw(st.booleans()), **options)
    torch.testing.assert_close(by_tokens, whole, equal_nan=True, rtol=1e-9, atol=1e-9)
    assert_same_states(state, state_by_tokens)
    visible = dense_visibility(
        tensors[3], **{n: o for n, o in options.items() if n not in ("score_mod", "sink_logits")}
    )
    assert torch.equal(state.peak, visible.sum(-1).amax(-1))
    assert torch.equal(state.living, visible[..., -1, :].sum(-1))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_chunks_by_flex(monkeypatch):
    """In its blocks, uncompiled; a dead key that is not finite reaches no later query."""

    def by_flex(*tensors, lowering, block_size, kernel_options, **facts):
        return attend_uncompiled(*tensors, **facts)

    monkeypatch.setattr("flexdma.state.growing_call.attend", by_flex)
    query, key, value, gate = inputs(2, 4, 2, 90, 90, 16, dtype=torch.float32)
    documents = torch.tensor([[3] * 50 + [4] * 40, [5] * 90])
    options = THRESHOLD | {"sinks": 1, "recent": 4, "document_ids": documents}
    whole = dense_dynamic_mask_attention(query, key, value, gate, **options)
    value[0, :, 10] = torch.inf
    split, _ = run((query, key, value, gate), [50, 33, 7], **options)
    torch.testing.assert_close(split[:, :, 50:], whole[:, :, 50:], rtol=1e-4, atol=1e-4)


def first_death(dies):
    """[..., K]: the first query i >= j in dies [..., i, j] for each key j; K for none."""
    length = dies.shape[-1]
    i = torch.arange(length)[:, None]
    return torch.where(dies & (i >= i.T), i, length).amin(-2)


def chunks(sizes, *tensors):
    """The tensors [.., n, ..] of consecutive chunks of these sizes; None stays."""
    start = 0
    for size in sizes:
        yield [None if t is None else t[:, :, start : start + size] for t in tensors]
        start += size


@settings(max_examples=25)
@given(st.integers(1, 40), st.sampled_from(["lifetime", "forever", "clock"]), st.integers(0, 100), st.data())
def test_keys_die_by_lifetimes_and_by_clocks(length, policy, seed, data):
    query, key, value, bias = inputs(2, 4, 2, length, length, 4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    position, given, end = torch.arange(length), {}, torch.full((2, 2, length), length)
    if policy == "lifetime":  # as DMS: a low score dies after a delay; and some keys that no query sees
        lifetime = torch.where(bias < 0, 3.0, torch.nan).masked_fill(bias.abs() < 0.2, 0.0)
        given = {"lifetime": lifetime}
        end = torch.fmin(end, position + lifetime).long()
    elif policy == "clock":  # as FoX with pruning: F_i - F_j < delta; whole numbers, so that both sides meet
        forget = -torch.randint(0, 3, (2, 2, length), generator=generator).double()
        if seed % 3 == 0:
            forget[:, 0, seed % length] = torch.nan
        forget = forget.cumsum(-1)
        given = {"clock": -forget, "expiry": -(forget - 4)}
        end = first_death(forget[..., :, None] - forget[..., None, :] < -4)
    want = dense_lifespan_attention(query, key, value, (position.expand_as(end), end), bias=bias)
    i = position[:, None]
    seen = ((position <= i) & (i < end[..., None, :])).sum(-1)
    for sizes in (data.draw(splits(length)), [1] * length):
        names, outputs = list(given), []
        state: Any = None
        for *chunk, added, first, second in chunks(
            sizes, query, key, value, bias, *given.values(), *[None] * (2 - len(given))
        ):
            arguments = dict(zip(names, (first, second), strict=False))
            output, state = growing_attention(*chunk, state=state, bias=added, donate=state is not None, **arguments)
            outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs, 2), want, rtol=1e-9, atol=1e-9)
        assert torch.equal(state.peak, seen.amax(-1))
        assert torch.equal(state.living, seen[..., -1])


def test_a_caller_evicts_by_changing_expiries():
    query, key, value, _ = inputs(1, 2, 1, 20, 20, 4)
    _, state = growing_attention(query[:, :, :12], key[:, :, :12], value[:, :, :12])
    state = replace(state, expiry=torch.where(state.position % 3 == 0, state.length - 1, state.expiry))
    position, end = torch.arange(20).expand(1, 1, -1), torch.full((1, 1, 20), 20)
    end[..., :12:3] = 12
    want = dense_lifespan_attention(query, key, value, (position, end))
    for chunk in chunks([1, 7], *(t[:, :, 12:] for t in (query, key, value))):
        output, state = growing_attention(*chunk, state=state)
        at = int(state.length) - output.shape[2]
        torch.testing.assert_close(output, want[:, :, at : int(state.length)], rtol=1e-9, atol=1e-9)
    assert (state.living.tolist(), state.peak.tolist(), state.last_loss.tolist()) == ([[16]], [[16]], [[12]])


@pytest.mark.parametrize("sizes", [[7, 1, 12, 10], [1] * 30])
def test_gradients_through_an_attached_state(sizes):
    leaves = [t.requires_grad_() for t in inputs(2, 4, 2, 30, 30, 4)]
    options = THRESHOLD | {"sinks": 1, "recent": 3}
    whole = dense_dynamic_mask_attention(*leaves, **options)
    split, state = run(leaves, sizes, **options)
    for got, want in zip(gradients(split, leaves), gradients(whole, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert state.key.requires_grad
    assert not state.detach().key.requires_grad


@torch.no_grad()
def test_slots_follow_the_living_keys_and_are_used_again():
    """Keys that die after eight positions stay in 16 slots; keys that live on double them; a new document frees them."""
    query, key, value, _ = inputs(1, 2, 1, 400, 400, 4, dtype=torch.float32)
    slots, moves = [], 0
    state: Any = None
    for at, (q, k, v) in enumerate(chunks([1] * 400, query, key, value)):
        lifetime = torch.full((1, 1, 1), 8.0 if at < 100 else torch.inf)
        ids = torch.tensor([[int(at >= 200)]])
        before = None if state is None else state.key.data_ptr()
        _, state = growing_attention(
            q, k, v, state=state, lifetime=lifetime, document_ids=ids, donate=state is not None
        )
        moves += state.key.data_ptr() != before
        slots.append(state.position.shape[-1])
    assert state.peak.tolist() == [[200]]
    assert state.living.tolist() == [[200]]
    # Slots of keys that died with their document are counted when no other is left.
    assert [slots[at] for at in (99, 199, 219, 259, 399)] == [16, 128, 128, 64, 256]
    # The first slots, and one copy for each change of their number: 32, 64, 128; 64, 128, 256.
    assert moves == 7
    assert state.nbytes == sum(t.nbytes for t in state.tensors().values()) > 0


@torch.no_grad()
@pytest.mark.parametrize(("sizes", "dynamic", "most"), [([1] * 40, None, 2), ([7, 3, 20, 10], True, 1)])
def test_compiled_calls_compile_at_most_once_per_number_of_slots(sizes, dynamic, most):
    """Dynamo makes symbols of sizes at their second value, or with dynamic=True at once."""
    options = THRESHOLD | {"sinks": 1, "recent": 2}
    tensors = inputs(2, 4, 2, 40, 40, 8, dtype=torch.float32)
    want = dense_dynamic_mask_attention(*(t.double() for t in tensors), **options)
    counter = CompileCounterWithBackend("eager")
    step: Any = torch.compile(dynamic_mask_attention, fullgraph=True, backend=counter, dynamic=dynamic)
    outputs, slots, state = [], set(), GrowingState.empty(2, 2, 8, sinks=1, recent=2)
    for chunk in chunks(sizes, *tensors):
        state = state.reserve(chunk[0].shape[2])
        slots.add(state.position.shape[-1])
        output, state = step(*chunk, state=state, return_state=True, donate=True, **options)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 2).double(), want, rtol=1e-5, atol=1e-5)
    assert slots >= {16, 32}
    assert counter.frame_count == most
    full = replace(state, position=state.position.clamp(min=0), expiry=torch.full_like(state.expiry, torch.inf))
    with pytest.raises(RuntimeError, match="expected an empty slot in every head, got a full one"):
        step(
            *(t[:, :, : sizes[-1]] for t in (*tensors[:3], tensors[3].abs())), state=full, return_state=True, **options
        )


@pytest.mark.parametrize("reads", [True, False])
def test_a_dead_key_that_is_not_finite_reaches_no_later_token(reads):
    """Neither where values are read nor elsewhere: with gradients, on a GPU, in a compiled function."""
    q, k, v, _ = inputs(1, 2, 1, 6, 6, 4, dtype=torch.float32)
    q.requires_grad_(not reads)
    lifetime = torch.tensor([2.0, *[torch.inf] * 5]).view(1, 1, 6)
    k[:, :, 0], v[:, :, 0] = torch.nan, torch.inf
    state: Any = None
    for at, (*token, age) in enumerate(chunks([1] * 6, q, k, v, lifetime)):
        output, state = growing_attention(*token, state=state, lifetime=age)
        assert output.isfinite().all() == (at >= 2)


def after(tokens, *, state=None, start=0, batch=2, **options):
    tensors = [t[:, :, start : start + tokens] for t in inputs(batch, 4, 2, 64, 64, 4, dtype=torch.float32)]
    output, state = dynamic_mask_attention(*tensors, state=state, return_state=True, **(THRESHOLD | options))
    return state, output


def test_a_state_is_a_value(tmp_path):
    state, _ = after(40, sinks=1, recent=2)
    kept = state.checkpoint()
    for tokens in (1, 4):
        after(tokens, state=state, start=40, sinks=1, recent=2)
    assert_same_states(state, kept)
    assert_same_states(state.restore(after(60, sinks=1, recent=2)[0]), after(60, sinks=1, recent=2)[0])
    leaves, spec = pytree.tree_flatten(state)
    spec = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert_same_states(pytree.tree_unflatten(leaves, spec), state)
    bounded = DynamicMaskState.empty(1, 1, 2, 3)
    save_states(tmp_path / "states.safetensors", {"a": state, "b": bounded})
    loaded = load_states(tmp_path / "states.safetensors")
    assert_same_states(loaded["a"], state)
    assert isinstance(loaded["b"], DynamicMaskState)
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt")
    assert_same_states(again, state)
    for tokens in (1, 3):
        torch.testing.assert_close(*(after(tokens, state=s, start=40, sinks=1, recent=2)[1] for s in (state, again)))


def test_rows_are_reordered_and_replaced():
    state, _ = after(40)
    turned = state.reorder(torch.tensor([1, 0, 1]))
    assert_same_states(turned.reorder(torch.tensor([1, 0])), state)
    assert turned.reorder(torch.tensor([], dtype=torch.int64)).reserve(3).length.shape == (0,)
    short, _ = after(3)  # has fewer slots
    for a, b in ((short, state), (state, short)):
        put = a.put(torch.tensor([1]), b.reorder(torch.tensor([0])))
        assert_same_states(put.reorder(torch.tensor([1])), b.reorder(torch.tensor([0])))
        assert_same_states(put.reorder(torch.tensor([0])), a.reorder(torch.tensor([0])))


def test_crop_is_the_prefix_or_refused():
    state, _ = after(40, sinks=2)
    prefix, cropped = after(25, sinks=2)[0], state.crop(15)
    assert_same_states(replace(cropped, peak=prefix.peak), prefix)
    for tokens in (1, 6):
        torch.testing.assert_close(*(after(tokens, state=s, start=25, sinks=2)[1] for s in (cropped, prefix)))
    with pytest.raises(ValueError, match="tokens: expected a rollback past no eviction"):
        after(40, recent=2)[0].crop(3)


@torch.no_grad()
@pytest.mark.parametrize(("form", "recency"), [("identity", None), ("linear", "forget")])
def test_the_layer_has_such_a_state(form, recency):
    torch.manual_seed(0)
    layer = DynamicMaskAttention(16, 4, 2, 8, None, selection="threshold", recent=2, form=form, recency=recency)
    torch.nn.init.normal_(layer.gate.A)
    hidden, padding = torch.randn(2, 40, 16), torch.ones(2, 40, dtype=torch.bool)
    padding[0, :5] = False
    whole = layer(hidden, key_padding_mask=padding)
    state, outputs = layer.empty_state(2), []
    assert isinstance(state, GrowingState)
    for start, end in ((0, 20), (20, 21), (21, 22), (22, 40)):
        output, state = layer(
            hidden[:, start:end], key_padding_mask=padding[:, start:end], state=state, return_state=True, donate=True
        )
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1)[padding], whole[padding], rtol=1e-5, atol=1e-5)


def test_what_has_no_such_state_names_it():
    q, k, v, gate = inputs(1, 2, 1, 6, 6, 4, dtype=torch.float32)
    _, state = dynamic_mask_attention(q, k, v, gate, return_state=True, **THRESHOLD)
    bounded = DynamicMaskState.empty(1, 1, 4, 3, selection="threshold")
    packed: Any = {"return_state": True, **THRESHOLD}
    rows = k[0].transpose(0, 1)
    with pytest.raises(
        TypeError, match="state: expected a GrowingState, as the selection has no bound, got DynamicMaskState"
    ):
        dynamic_mask_attention(q, k, v, gate, state=bounded, **THRESHOLD)
    with pytest.raises(TypeError, match="state: expected a DynamicMaskState, got GrowingState"):
        dynamic_mask_attention(q, k, v, gate, state=state, window_size=3)
    with pytest.raises(ValueError, match="state: expected selection='clock', got a state with selection='threshold'"):
        growing_attention(q, k, v, state=state, clock=gate.cumsum(-1).sort().values, expiry=gate)
    with pytest.raises(ValueError, match="window_size: expected an int or one per gate head in a DynamicMaskState"):
        DynamicMaskState.empty(1, 1, 4, None, selection="threshold")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"window_size: expected .* with return_state of packed sequences, .* got None"
    ):
        dynamic_mask_attention_varlen(rows, rows, rows, rows[..., 0], torch.tensor([0, 6]), **packed)
    with pytest.raises(ValueError, match=r"return_state: expected False inside torch.func"):
        torch.func.vmap(lambda g: dynamic_mask_attention(q, k, v, g, return_state=True, **THRESHOLD)[0])(gate[None])
    with pytest.raises(ValueError, match="clock: expected numbers that do not fall"):
        growing_attention(q, k, v, clock=-torch.arange(6.0).view(1, 1, 6), expiry=gate)
    with pytest.raises(ValueError, match="expiry: expected a tensor, as clock and expiry belong together, got None"):
        growing_attention(q, k, v, clock=gate)
    with pytest.raises(ValueError, match="lifetime: expected None with a clock"):
        growing_attention(q, k, v, clock=gate.abs().cumsum(-1), expiry=gate, lifetime=gate)
    with pytest.raises(ValueError, match=r"lifetime: expected \[1, 1, 6\], got \[1, 1, 5\]"):
        growing_attention(q, k, v, lifetime=gate[..., 1:])
    with pytest.raises(ValueError, match="sinks: expected 0 with selection='clock', got 1"):
        GrowingState.empty(1, 1, 4, selection="clock", sinks=1)
    with pytest.raises(ValueError, match="donate: expected False"):
        dynamic_mask_attention(q, k, v, gate.requires_grad_(), state=state, return_state=True, donate=True, **THRESHOLD)
