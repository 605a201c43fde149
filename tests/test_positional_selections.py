"""Selections that need no gate, "sliding" and "full", equal scaled_dot_product_attention, in the operator and the layer."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from flexdma import DynamicMaskAttention, dynamic_mask_attention, dynamic_mask_attention_varlen
from flexdma.reference import dense_dynamic_mask_attention
from tests.comparison import gather, gradients_of, inputs, with_gradients
from tests.lowerings.uncompiled_flex import flex_with_gradients
from tests.test_modules import rotary

MASK = torch.ones(2, 40, dtype=torch.bool)
MASK[0, 3:5] = MASK[0, 20:23] = MASK[1, 39] = False
DOCUMENTS = torch.stack([torch.arange(40) // 15, torch.arange(40) // 33])


def visible(i, j, window, sinks, recent, mask, documents):
    """Whether the query at position i sees the key at j, for one sequence; window=None is full attention."""
    first = next(k for k in range(len(documents)) if documents[k] == documents[i])
    if not first <= j <= i or not mask[j]:
        return False
    is_sink = sum(bool(mask[k]) for k in range(first, j)) < sinks
    return is_sink or window is None or i - j < window + recent


def allowed(batch, length, windows, sinks=0, recent=0, mask=None, documents=None):
    """[B, len(windows), K, K] bool."""
    mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask
    documents = torch.zeros(batch, length) if documents is None else documents
    cells = [
        visible(i, j, window, sinks, recent, mask[b], documents[b])
        for b in range(batch) for window in windows for i in range(length) for j in range(length)
    ]  # fmt: skip
    return torch.tensor(cells).view(batch, len(windows), length, length)


def attended(query, key, value, bias=None, *, seen):
    """scaled_dot_product_attention under a mask; 0 where a query sees no key."""
    group = query.shape[1] // key.shape[1]
    added = torch.zeros(()) if bias is None else bias[:, :, None]
    added = torch.where(seen, added, -torch.inf).to(query.dtype)
    added = added.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    added = added.expand(-1, key.shape[1], -1, -1).repeat_interleave(group, 1)
    output = scaled_dot_product_attention(query, key, value, attn_mask=added, enable_gqa=True)
    return torch.where(seen.any(-1).repeat_interleave(query.shape[1] // seen.shape[1], 1)[..., None], output, 0.0)


@settings(max_examples=15)
@given(st.data())
def test_the_operator_is_scaled_dot_product_attention_under_a_mask(data):
    length = data.draw(st.integers(1, 20))
    tensors = inputs(2, 4, 2, length, length, 4, seed=length)[:3]
    windows = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=2))
    kind = data.draw(st.sampled_from(["sliding", "full"]))
    options: dict[str, Any] = {"sinks": data.draw(st.integers(0, 2)), "recent": data.draw(st.integers(0, 4))}
    masks: dict[str, Any] = {}
    if data.draw(st.booleans()):
        masks["key_padding_mask"] = torch.tensor(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
        masks["key_padding_mask"] = torch.stack([masks["key_padding_mask"], masks["key_padding_mask"].roll(1)])
    if data.draw(st.booleans()):
        masks["document_ids"] = torch.stack([torch.arange(length) // 6, torch.arange(length) // 9])
    if kind == "full":
        windows, options = [None], {}
    window = windows[0] if len(windows) == 1 else windows
    seen = allowed(2, length, windows, **options, mask=masks.get("key_padding_mask"),
                   documents=masks.get("document_ids"))  # fmt: skip
    want = attended(*tensors, seen=seen)
    attend: Any
    for attend in (dense_dynamic_mask_attention, gather):
        got = attend(*tensors, None, window_size=window, selection=kind, **options, **masks)
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


CASES: dict[str, tuple[dict[str, Any], list[int | None]]] = {
    "sliding": ({"window_size": 7}, [7]),
    "sinks and recent": ({"window_size": 7, "sinks": 2, "recent": 9}, [7]),
    "windows per head": ({"window_size": [7, 3]}, [7, 3]),
    "full": ({"window_size": None, "selection": "full"}, [None]),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize("with_gates", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_every_lowering_has_the_gradients_of_scaled_dot_product_attention(name, with_gates):
    """With gates those are added to the logits, whatever the key's rank."""
    options, windows = {"selection": "sliding", **CASES[name][0]}, CASES[name][1]
    masks = {"key_padding_mask": MASK, "document_ids": DOCUMENTS}
    seen = allowed(2, 40, windows, options.get("sinks", 0), options.get("recent", 0), MASK, DOCUMENTS)
    tensors = inputs(2, 4, 2, 40, 40, 16)
    tensors = tensors if with_gates else tensors[:3]
    want = with_gradients(lambda q, k, v, bias=None: attended(q, k, v, bias, seen=seen), tensors)

    def call(attend):
        return lambda q, k, v, bias=None, **more: attend(q, k, v, bias, **options, **masks, **more)

    for attend, tolerance in ((gather, 1e-12), (dense_dynamic_mask_attention, 1e-12), (flex_with_gradients, 1e-5)):
        for got, expected in zip(with_gradients(call(attend), tensors), want, strict=True):
            torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def test_learned_sinks_beside_a_window():
    """As in GPT-OSS, where every second layer has a window."""
    tensors, sink = inputs(2, 4, 2, 40, 40, 8)[:3], torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    options: dict[str, Any] = {"window_size": 7, "selection": "sliding", "recent": 2}
    group = tensors[0].unflatten(1, (2, 2))
    scores = (group @ tensors[1][:, :, None].mT * 8**-0.5).flatten(1, 2)
    scores = scores.masked_fill(~allowed(2, 40, [7], recent=2), -torch.inf)
    weights = torch.cat([scores, sink.view(-1, 1, 1).expand(2, 4, 40, 1)], -1).softmax(-1)[..., :40]
    want = weights @ tensors[2].repeat_interleave(2, 1)
    whole = gather(*tensors, None, sink_logits=sink, **options)
    torch.testing.assert_close(whole, want, atol=1e-12, rtol=1e-12)
    attend: Any = dynamic_mask_attention
    state, outputs = None, []
    for parts in zip(*(t.split([20, 1, 18, 1], 2) for t in tensors), strict=True):
        output, state = attend(*parts, None, state=state, return_state=True, sink_logits=sink, **options)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 2), want, atol=1e-12, rtol=1e-12)


def test_packed_sequences_without_gates():
    query, key, value = (torch.randn(40, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    ends = torch.tensor([0, 15, 15, 33, 40])
    for window, kind in ((7, "sliding"), (None, "full")):
        output = dynamic_mask_attention_varlen(query, key, value, None, ends, window_size=window, selection=kind)
        for start, end in ((0, 15), (15, 33), (33, 40)):
            alone = [t[start:end].transpose(0, 1)[None] for t in (query, key, value)]
            want = attended(*alone, seen=allowed(1, end - start, [window]))
            torch.testing.assert_close(output[start:end].transpose(0, 1)[None], want, atol=1e-12, rtol=1e-12)


def made(selection, **options):
    window = {"sliding": 7, "full": None, "causal": 9}[selection]
    layer = DynamicMaskAttention(32, 4, 2, 8, window, selection=selection, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    return layer.double()


@pytest.mark.parametrize("selection", ["sliding", "full"])
def test_a_layer_without_a_gate_has_no_parameters_for_it(selection):
    layer = made(selection, qk_norm=True)
    assert layer.gate is None
    assert not [name for name, _ in layer.named_parameters() if "gate" in name]
    hidden, tables = torch.randn(2, 40, 32, dtype=torch.float64), rotary(40, 8)
    query, key, value = layer.project(hidden, tables)
    seen = allowed(2, 40, [layer.policy.window_size], mask=MASK, documents=DOCUMENTS)
    want = layer.o_proj(attended(query, key, value, seen=seen).transpose(1, 2).flatten(2))
    masks: dict[str, Any] = {"key_padding_mask": MASK, "document_ids": DOCUMENTS}
    torch.testing.assert_close(layer(hidden, tables, **masks), want, atol=1e-12, rtol=1e-12)
    again = checkpoint(layer, hidden, tables, use_reentrant=False, **masks)
    torch.testing.assert_close(again, want, atol=1e-12, rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("selection", "options", "slots"),
    [("sliding", {}, 7), ("sliding", {"sinks": 2, "recent": 9}, 18), ("full", {}, 64)],
)
def test_a_layer_without_a_gate_decodes_as_in_one_pass(selection, options, slots, masked):
    layer = made(selection, **options)
    hidden = torch.randn(2, 40, 32, dtype=torch.float64)
    masks = {"key_padding_mask": MASK, "document_ids": DOCUMENTS} if masked else {}
    want = layer(hidden, **masks)
    for sizes, donate in (([1] * 40, True), ([13, *[1] * 9, 17, 1], False)):
        state, outputs = layer.empty_state(2), []
        parts = {name: mask.split(sizes, 1) for name, mask in masks.items()}
        for number, part in enumerate(hidden.split(sizes, 1)):
            given = {name: mask[number] for name, mask in parts.items()}
            output, state = layer(part, state=state, return_state=True, donate=donate, **given)
            outputs.append(output)
        torch.testing.assert_close(torch.cat(outputs, 1), want, atol=1e-12, rtol=1e-12)
        assert state.key.shape[2] == slots or (selection == "full" and state.key.shape[2] < slots)


class Mixed(nn.Module):
    """A layer of each selection."""

    def __init__(self, *kinds):
        super().__init__()
        self.layers = nn.ModuleList(made(kind).float() for kind in kinds)

    def forward(self, hidden, tables, mask):
        for layer in self.layers:
            hidden = hidden + layer(hidden, tables, key_padding_mask=mask)
        return hidden


@pytest.mark.parametrize(
    "backend", ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))]
)
def test_a_model_that_mixes_selections_compiles_twice_for_changing_lengths(backend):
    model = Mixed("sliding", "full")
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for length in (30, 41, 57):
        hidden, mask = torch.randn(2, length, 32), torch.arange(length) < torch.tensor([[length], [length - 4]])
        results = []
        for function in (model, compiled):
            model.zero_grad()
            output = function(hidden, rotary(length, 8), mask)
            output[mask].square().mean().backward()
            results.append([output.detach(), *gradients_of(model.parameters())])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 2


@torch.no_grad()
def test_a_model_that_mixes_selections_under_autocast():
    model, hidden = Mixed("sliding", "full"), torch.randn(2, 40, 32)
    want = model(hidden, rotary(40, 8), MASK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(hidden, rotary(40, 8), MASK)
        assert made("sliding").float().empty_state(1).key.dtype == torch.bfloat16
    assert (got - want).abs().max() < 0.03 * want.abs().max()


def test_what_has_no_meaning_is_refused_by_name():
    query, key, value, gate = inputs(1, 4, 2, 6, 6, 8)
    with pytest.raises(
        TypeError, match="gate: expected a tensor with selection='causal', which chooses by it, got None"
    ):
        dynamic_mask_attention(query, key, value, None, window_size=2)
    for name, size in (("window_size", 4), ("sinks", 1), ("recent", 2)):
        options: dict[str, Any] = {"window_size": None, name: size}
        with pytest.raises(ValueError, match=f"{name}: expected (None|0) with selection='full', which sees all keys"):
            dynamic_mask_attention(query, key, value, gate, selection="full", **options)
    with pytest.raises(TypeError, match="window_size: expected an int or one int per key/value head, got None"):
        dynamic_mask_attention(query, key, value, gate, selection="sliding", window_size=None)
    with pytest.raises(
        ValueError, match="recency: expected None with selection='full', which has no gate, got 'slope'"
    ):
        DynamicMaskAttention(32, 4, 2, 8, None, selection="full", recency="slope")
