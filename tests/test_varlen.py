"""Sequences packed into one row: each sequence alone is the oracle, by the dense specification in float64."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import flexdma.varlen
from flexdma import DynamicMaskAttention, ValueGate, dynamic_mask_attention, dynamic_mask_attention_varlen
from flexdma.reference import dense_dynamic_mask_attention
from tests.comparison import gradients_of, with_gradients
from tests.state.test_state_equality import assert_same_states
from tests.test_modules import rotary

LENGTHS = [5, 0, 130, 1, 77]
varlen: Any = dynamic_mask_attention_varlen  # mypy does not count unpacked tensors


def ends(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def packed(lengths, heads=2, size=8, value_size=8, dtype=torch.float64, gate_heads=None, seed=0):
    """query [T, 2 heads, D], key, value, gate; gates with ties, and some of -inf."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)

    def normal(*shape):
        return torch.randn(tokens, *shape, generator=generator, dtype=torch.float64).to(dtype)

    gate = normal(gate_heads or heads).to(dtype if dtype == torch.float64 else torch.float32)
    gate[::3] = gate[::3].round()
    gate[::7] = -torch.inf
    return normal(2 * heads, size), normal(heads, size), normal(heads, value_size), gate


def parts(lengths, *tensors):
    """The tensors [1, H, n, ...] of each sequence that is not empty, and its number."""
    for number, (start, end) in enumerate(pairwise(ends(lengths).tolist())):
        if end > start:
            yield number, [tensor[start:end].transpose(0, 1)[None] for tensor in tensors]


def apart(lengths, attend=dense_dynamic_mask_attention):
    """A function of packed tensors that attends to each sequence alone, as for a batch of sequences."""

    def attend_each(*tensors, score_mod=None, **options):
        outputs = []
        for number, part in parts(lengths, *tensors):

            def at_number(score, b, h, i, j, number=number):
                return score_mod(score, b + number, h, i, j)

            outputs.append(attend(*part, score_mod=at_number if score_mod else None, **options))
        return torch.cat(outputs, 2)[0].transpose(0, 1)

    return attend_each


def in_one_row(lengths):
    return lambda *tensors, **options: varlen(*tensors, ends(lengths), **options)


def assert_equals_each_alone(lengths, tensors, *, attend=None, tolerance=1e-12, gradients=True, **options):
    """Packed attention equals the float64 specification of each sequence: outputs, and gradients of all tensors."""
    exact, attend = [tensor.double() for tensor in tensors], attend or in_one_row(lengths)
    if gradients:
        got, want = with_gradients(attend, tensors, **options), with_gradients(apart(lengths), exact, **options)
    else:
        with torch.no_grad():
            got, want = [attend(*tensors, **options)], [apart(lengths)(*exact, **options)]
    for name, a, b in zip(("output", "query", "key", "value", "gate"), got, want, strict=False):
        assert a.shape == b.shape, name
        error = (a.double() - b).abs().max().item()
        assert error <= tolerance * max(1.0, b.abs().max().item()), f"{name}: error {error}"


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {},
    "sinks and recent": {"sinks": 2, "recent": 3},
    "threshold": {"selection": "threshold", "window_size": None, "sinks": 1},
    "threshold and window": {"selection": "threshold"},
    "global": {"selection": "global"},
    "windows per head": {"window_size": [3, 200]},
    "learned sinks": {"sink_logits": torch.linspace(-1, 2, 4, dtype=torch.float64)},
    # b is the sequence, and i and j are positions in it: products of positions differ from those of the row.
    "score_mod": {"score_mod": lambda score, b, h, i, j: score + 0.1 * b - 0.01 * i * j + 0.3 * h, "scale": 0.5},
}


@pytest.mark.parametrize("lowering", [None, "dense"])
@pytest.mark.parametrize("name", OPTIONS)
def test_packed_sequences_equal_each_alone(name, lowering):
    options = {"window_size": 9, **OPTIONS[name]}

    def attend(*tensors, **options):
        return varlen(*tensors, ends(LENGTHS), lowering=lowering, **options)

    for gradients in (True, False):
        assert_equals_each_alone(LENGTHS, packed(LENGTHS), attend=attend, gradients=gradients, **options)


@settings(max_examples=25)
@given(st.lists(st.sampled_from([0, 1, 1, 2, 5, 17, 40]), min_size=1, max_size=6), st.data())
def test_any_lengths(lengths, data):
    lengths[data.draw(st.integers(0, len(lengths) - 1))] += 1
    options = {
        "window_size": data.draw(st.integers(1, 50)),
        "selection": data.draw(st.sampled_from(["causal", "global", "threshold", "sliding"])),
        "sinks": data.draw(st.integers(0, 3)),
        "recent": data.draw(st.integers(0, 3)),
    }
    value_size, gate_heads = data.draw(st.sampled_from([8, 4])), data.draw(st.integers(1, 2))
    tensors = packed(lengths, value_size=value_size, gate_heads=gate_heads, seed=sum(lengths))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))

    def attend(*tensors, **options):
        return varlen(*tensors, ends(lengths, dtype), block_size=16, **options)

    for gradients in (True, False):
        assert_equals_each_alone(lengths, tensors, attend=attend, gradients=gradients, **options)


def test_packed_sequences_are_documents():
    tensors = packed(LENGTHS, seed=3)
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None]
    row = [tensor.transpose(0, 1)[None] for tensor in tensors]
    want = dynamic_mask_attention(*row, window_size=9, document_ids=documents)[0].transpose(0, 1)
    got = varlen(*tensors, ends(LENGTHS), window_size=9)
    assert torch.equal(got, want)
    assert got.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_autocast(dtype):
    low = packed(LENGTHS, dtype=dtype)
    assert_equals_each_alone(LENGTHS, low, tolerance=0.02, window_size=9)
    wide = [tensor.float() for tensor in low]
    with torch.autocast("cpu", dtype):
        got = varlen(*wide, ends(LENGTHS), window_size=9)
    assert torch.equal(got, varlen(*low, ends(LENGTHS), window_size=9))


@torch.no_grad()
def test_inference_compiles_for_all_lengths():
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(varlen, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([5, 0, 60], [3, 3, 200, 4, 1], [20, 0, 0, 33], [260, 9], [128], [7]):

        def attend(*tensors, lengths=lengths, **options):
            return compiled(*tensors, ends(lengths), **options)

        tensors = packed(lengths, dtype=torch.float32, seed=sum(lengths))
        options = {"window_size": 6, "sinks": 1}
        assert_equals_each_alone(lengths, tensors, attend=attend, tolerance=2e-5, gradients=False, **options)
    assert counter.frame_count <= 4  # one sequence is a case of its own


@pytest.mark.slow
@torch.no_grad()
def test_by_flexattention():
    lengths, options = [5, 0, 30, 1, 77], {"sinks": 1, "score_mod": lambda score, b, h, i, j: score - 0.1 * (b + 1) * i}
    tensors = packed(lengths, size=16, value_size=16, dtype=torch.float32)
    got = in_one_row(lengths)(*tensors, window_size=6, lowering="flex", **options)
    want = apart(lengths)(*(tensor.double() for tensor in tensors), window_size=6, **options)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)


def test_fake_tensors_and_transformations():
    tensors, lengths = packed([3, 0, 5]), ends([3, 0, 5])
    output, state = varlen(*(t.to("meta") for t in tensors), lengths.to("meta"), window_size=2, return_state=True)
    assert output.shape == (8, 4, 8)
    assert state.key.shape == (3, 2, 2, 8)

    def loss(query):
        return varlen(query, *tensors[1:], lengths, window_size=2).square().sum()

    leaf = tensors[0].clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(tensors[0]), torch.autograd.grad(loss(leaf), leaf)[0])


@pytest.mark.parametrize("selection", ["causal", "global", "threshold"])
def test_no_padding_is_computed(monkeypatch, selection):
    """The lowering gets T tokens, and no block gathers more keys than the longest sequence has."""
    calls = []

    def attend(query, key, *others, capacity, **options):
        calls.append((query.shape[2], key.shape[2], capacity))
        return query

    monkeypatch.setattr(flexdma.varlen, "attend", attend)
    lengths = [300, *[2] * 50, 0]
    for window in (64, 1000, None) if selection == "threshold" else (64, 1000):
        varlen(*packed(lengths), ends(lengths), window_size=window, selection=selection)
    assert calls == [(400, 400, 64), (400, 400, 300), (400, 400, 300)][: len(calls)]


@settings(max_examples=25)
@given(st.lists(st.sampled_from([0, 1, 2, 7, 30]), min_size=1, max_size=5), st.data())
def test_states_are_those_of_each_alone(lengths, data):
    lengths[-1] += 1
    options = {
        "window_size": data.draw(st.sampled_from([1, 4, 40])),
        "selection": data.draw(st.sampled_from(["causal", "threshold"])),
        "sinks": data.draw(st.integers(0, 3)),
        "recent": data.draw(st.integers(0, 3)),
    }
    tensors = packed(lengths, seed=len(lengths))
    output, state = varlen(*tensors, ends(lengths), return_state=True, **options)
    assert torch.equal(output, varlen(*tensors, ends(lengths), **options))
    for number, part in parts(lengths, *tensors):
        _, alone = dynamic_mask_attention(*part, return_state=True, **options)
        assert_same_states(state.reorder(torch.tensor([number])), alone)
    assert state.length.tolist() == state.real_length.tolist() == lengths


def test_decoding_goes_on_from_packed_sequences():
    """Prompts and then two tokens for each; gradients flow through the states."""
    lengths, options = [4, 0, 23, 1], {"window_size": 5, "sinks": 1, "recent": 2}
    full = [n + 2 for n in lengths]
    whole = packed(full, seed=5)
    new = torch.cat([torch.tensor([n - 2, n - 1]) + start for n, start in zip(full, ends(full).tolist(), strict=False)])
    old = torch.ones(sum(full), dtype=torch.bool).index_fill(0, new, False)

    def in_steps(*tensors, **options):
        output, state = varlen(*(tensor[old] for tensor in tensors), ends(lengths), return_state=True, **options)
        steps = []
        for step in range(2):
            one = [tensor[new.view(-1, 2)[:, step]][:, :, None] for tensor in tensors]  # [S, H, 1, ...]
            after, state = dynamic_mask_attention(*one, state=state, return_state=True, **options)
            steps.append(after[:, :, 0])
        # From the order (old, new) to that of the row.
        order = torch.cat([old.nonzero()[:, 0], new])
        joined = torch.cat([output, torch.stack(steps, 1).flatten(0, 1)])
        return joined[order.argsort()]

    assert_equals_each_alone(full, whole, attend=in_steps, **options)


@pytest.mark.parametrize("recency", [None, "slope", "forget"])
def test_a_layer_attends_to_each_sequence_alone(recency):
    lengths = [5, 0, 40, 1]
    layer = DynamicMaskAttention(32, 4, 2, 8, 6, recency=recency, qk_norm=True, sinks=1).double()
    torch.nn.init.normal_(layer.gate.A)
    cos, sin = (table.double() for table in rotary(40, 8))
    position = torch.cat([torch.arange(n) for n in lengths])
    hidden = torch.randn(1, sum(lengths), 32, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(hidden)

    def in_one_row():
        return layer(hidden, (cos[position], sin[position]), cu_seqlens=ends(lengths))

    def apart():
        rows = [row for row in hidden.split(lengths, 1) if row.shape[1]]
        return torch.cat([layer(row, (cos[: row.shape[1]], sin[: row.shape[1]])) for row in rows], 1)

    results = []
    for function in (in_one_row, apart):
        output = function()
        leaves = [hidden, *layer.parameters()]
        results.append([output, *torch.autograd.grad(output, leaves, cotangent)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)  # gates are projected in float32


@pytest.mark.parametrize("recency", [None, "slope", "forget"])
def test_a_layer_decodes_from_packed_sequences(recency):
    lengths = [5, 0, 40, 1]
    layer = DynamicMaskAttention(32, 4, 2, 8, 6, recency=recency, recent=2)
    torch.nn.init.normal_(layer.gate.A)
    hidden = torch.randn(1, sum(lengths), 32)
    output, state = layer(hidden, cu_seqlens=ends(lengths), return_state=True)
    torch.testing.assert_close(output, layer(hidden, cu_seqlens=ends(lengths)))
    later = torch.randn(4, 3, 32)
    got = layer(later, state=state)
    for row, number in zip(hidden.split(lengths, 1), range(4), strict=True):
        whole = layer(torch.cat([row, later[number : number + 1]], 1))
        torch.testing.assert_close(got[number], whole[0, -3:], atol=1e-5, rtol=1e-5)


def test_a_compiled_layer_trains_at_all_lengths():
    layer = DynamicMaskAttention(32, 4, 2, 8, 6, recency="slope")
    torch.nn.init.normal_(layer.gate.A)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([5, 0, 60], [3, 3, 200, 4, 1], [20, 33, 2]):
        hidden = torch.randn(1, sum(lengths), 32)
        results = []
        for function in (layer, compiled):
            layer.zero_grad()
            output = function(hidden, cu_seqlens=ends(lengths))
            output.square().sum().backward()
            results.append([output.detach(), *gradients_of(layer.parameters())])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=2e-4)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("recency", ["slope", "forget"])
def test_gates_begin_anew_in_each_sequence(recency):
    """So distances and sums do not grow with the row, and a slope's gradient keeps its precision."""
    gate, value, lengths = ValueGate(2, 8, recency=recency), torch.randn(1, 2, 12, 8), [4, 8]
    row = gate(value, cu_seqlens=ends(lengths))
    for part, found in zip(value.split(lengths, 2), row.split(lengths, 2), strict=True):
        torch.testing.assert_close(found, gate(part), atol=1e-6, rtol=1e-6)


TENSORS = packed([3, 5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": ends([3, 4])}, r"cu_seqlens: expected growing numbers from 0 to 8 tokens, got \[0, 3, 7\]"),
        ({"cu_seqlens": torch.tensor([0, 5, 3, 8])}, "cu_seqlens: expected growing numbers from 0 to 8 tokens"),
        ({"cu_seqlens": torch.tensor([1, 8])}, "cu_seqlens: expected growing numbers from 0 to 8 tokens"),
        ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens: expected \[S \+ 1\] with S >= 1 sequences, got \[1\]"),
        ({"cu_seqlens": ends([3, 5])[None]}, r"cu_seqlens: expected \[S \+ 1\], got \[1, 3\]"),
        ({"cu_seqlens": ends([3, 5]).float()}, "cu_seqlens: expected torch.int32 or torch.int64, got torch.float32"),
        ({"cu_seqlens": [0, 3, 8]}, r"cu_seqlens: expected a tensor \[S \+ 1\], got list"),
        ({"cu_seqlens": ends([3, 5]).to("meta")}, "cu_seqlens: expected a tensor on cpu, got one on meta"),
        ({"query": TENSORS[0][None]}, r"query: expected \[T, Hq, D\], got \[1, 8, 4, 8\]"),
        ({"key": TENSORS[1][:7]}, r"key: expected \[8, Hkv, 8\], got \[7, 2, 8\]"),
        ({"gate": TENSORS[3].T}, r"gate: expected \[8, 2\], got \[2, 8\]"),
        ({"selection": "global", "return_state": True}, "selection: expected one of .* with a state, got 'global'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = dict(zip(("query", "key", "value", "gate"), TENSORS, strict=True))
    with pytest.raises((TypeError, ValueError), match=message):
        varlen(**{**arguments, "cu_seqlens": ends([3, 5]), "window_size": 2, **change})


def test_a_layer_names_what_does_not_go_with_sequences():
    layer, hidden = DynamicMaskAttention(32, 4, 2, 8, 6), torch.randn(1, 8, 32)
    for name, other in (("document_ids", torch.zeros(1, 8, dtype=torch.int64)), ("state", layer.empty_state(1))):
        with pytest.raises(ValueError, match=f"{name}: expected None with cu_seqlens, got a {type(other).__name__}"):
            layer(hidden, cu_seqlens=ends([3, 5]), **{name: other})
    with pytest.raises(ValueError, match="donate: expected False unless a state is given and returned, got True"):
        layer(hidden, cu_seqlens=ends([3, 5]), return_state=True, donate=True)
    with pytest.raises(ValueError, match="cu_seqlens: expected all sequences in one row, got 2 rows"):
        layer(hidden.expand(2, -1, -1), cu_seqlens=ends([3, 5]))
    gate, value = ValueGate(2, 8, recency="forget"), torch.randn(1, 2, 8, 8)
    with pytest.raises(ValueError, match="first_position: expected 0 with cu_seqlens"):
        gate(value, cu_seqlens=ends([3, 5]), first_position=3)
    with pytest.raises(ValueError, match="forgotten: expected None with cu_seqlens"):
        gate(value, cu_seqlens=ends([3, 5]), forgotten=torch.zeros(1, 2, dtype=torch.float64))
