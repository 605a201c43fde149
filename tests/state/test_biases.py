"""States of tokens with biases: any chunks are one pass, and a state without biases holds none."""

import copy
from functools import reduce
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from flexdma import (
    DynamicMaskState,
    dynamic_mask_attention,
    dynamic_mask_attention_varlen,
    load_states,
    save_states,
)
from flexdma.lifespans import Selection
from flexdma.reference import dense_dynamic_mask_attention
from flexdma.state.joined import empty_run, joined, run_of
from tests.comparison import inputs, with_gradients
from tests.lifespans.gate_strategies import gates, selections, two_sequences
from tests.state.test_joined import in_order
from tests.state.test_state_equality import splits
from tests.test_logit_bias import falling_or_rising, with_bias

BOUNDED: dict[str, Any] = {"window_size": 5, "sinks": 1, "recent": 2}
GROWING: dict[str, Any] = {"window_size": None, "selection": "threshold", "sinks": 1}
EITHER = pytest.mark.parametrize("options", [BOUNDED, GROWING], ids=["bounded", "growing"])


def made(length=20, slopes=(0.7, -0.4), **options):
    """Query, key, value, gate and a bias of two slopes."""
    tensors = inputs(2, 4, 2, length, length, 4, **options)
    noise = inputs(2, 2, 2, 1, length, 1, seed=9)[3]
    return [*tensors, falling_or_rising(2, length, list(slopes)) + noise]


def in_chunks(tensors, sizes, *, donate=False, state=None, key_padding_mask=None, document_ids=None, **options):
    """Outputs of consecutive chunks of these sizes, and the state after them."""
    masks = {"key_padding_mask": key_padding_mask, "document_ids": document_ids}
    outputs, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        output, state = with_bias(dynamic_mask_attention)(
            *(t[:, :, part] for t in tensors), state=state, return_state=True, donate=donate and state is not None,
            **{name: None if mask is None else mask[:, part] for name, mask in masks.items()}, **options,
        )  # fmt: skip
        outputs.append(output)
        start += size
    return torch.cat(outputs, 2), state


@settings(max_examples=40)
@given(gates(max_length=25), st.data())
def test_any_split_is_one_pass(gate, data):
    """Ties, NaN, padding, documents, sinks and recent keys, in both kinds of states."""
    length = gate.shape[2]
    options: dict[str, Any] = data.draw(selections(length))
    options["selection"] = data.draw(st.sampled_from(["causal", "threshold", "sliding"]))
    options["window_size"] = data.draw(st.integers(1, 9))
    if data.draw(st.booleans()):
        options |= {"selection": "threshold", "window_size": None}
    if data.draw(st.booleans()) and not (options["recent"] and options["selection"] == "threshold"):
        options["sink_logits"] = torch.tensor([0.5, -1.0, -torch.inf, 2.0]).double()
    if data.draw(st.booleans()):
        options["score_mod"] = lambda score, b, h, i, j: score - 0.1 * (i - j) * (h + 1 + b)
    bias = falling_or_rising(2, length, data.draw(st.sampled_from([[1e6, 0.5], [-1e6, 0.0], [0.1, -0.1]])))
    bias = bias[:, : gate.shape[1]].expand(2, -1, -1).clone()
    if data.draw(st.booleans()):
        special = st.sampled_from([-torch.inf, torch.inf, torch.nan, 0.0, 1.0])
        bias[0, 0] = torch.tensor(data.draw(st.lists(special, min_size=length, max_size=length)))
    tensors = [*two_sequences(gate, options), bias]
    whole = with_bias(dense_dynamic_mask_attention)(*tensors, **options)
    for sizes in (data.draw(splits(length)), [1] * length):
        for leaf in (False, True):  # with code that reads values, and without
            tensors[0] = tensors[0].detach().requires_grad_(leaf)
            got, state = in_chunks(tensors, sizes, donate=not leaf and data.draw(st.booleans()), **options)
            torch.testing.assert_close(got.detach(), whole, equal_nan=True, rtol=1e-8, atol=1e-8)
            assert (state.bias[state.position < 0] == 0).all()


@EITHER
@pytest.mark.parametrize("sizes", [[20], [9, 1, 1, 1, 8], [1] * 20])
def test_gradients_through_a_state(sizes, options):
    got = with_gradients(lambda *tensors: in_chunks(tensors, sizes, **options)[0], made())
    want = with_gradients(with_bias(dense_dynamic_mask_attention), made(), **options)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("selection", ["full", "sliding"])
def test_biases_without_gates(selection):
    *tensors, _gate, bias = made()
    options = {"selection": selection, "window_size": None if selection == "full" else 6}
    got, _ = in_chunks([*tensors, bias], [7, 1, 1, 11], **options)
    torch.testing.assert_close(got, with_bias(dense_dynamic_mask_attention)(*tensors, bias, **options))


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("slopes", [(0.5, 3e2), (-0.5, -3e2)], ids=["rising", "falling"])
def test_a_run_of_tokens_is_one_pass_however_biases_move(slopes, donate):
    """In float32, from position a million on: the number that is subtracted follows the best visible sum.

    Four neighbours have the same, so that their differences count.
    """
    *tensors, _ = made(200)
    bias = torch.tensor(slopes).double()[:, None] * (1e6 + torch.arange(200) // 4)
    tensors = [*(t.float() for t in tensors), bias.expand(2, -1, -1)]
    options = {"window_size": 40, "recent": 2}
    exact = [t.double() for t in tensors]
    with torch.no_grad():
        got, state = in_chunks(tensors, [50, *[1] * 150], donate=donate, **options)
    assert state._run is not None
    want = with_bias(dense_dynamic_mask_attention)(*exact, **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    after = in_chunks(tensors, [200], **options)[1]
    for name in ("position", "gate", "bias"):
        assert torch.equal(*(in_order_of_position(each, name) for each in (state, after)))


def in_order_of_position(state, name):
    return getattr(state, name).gather(-1, state.position.argsort(-1))


def test_writing_to_the_biases_of_a_state_ends_its_run():
    tensors = made()
    with torch.no_grad():
        _, state = in_chunks([t[:, :, :15] for t in tensors], [14, 1], **BOUNDED)
        state.bias.zero_()
        got, _ = in_chunks([t[:, :, 15:16] for t in tensors], [1], state=state, **BOUNDED)
        fresh = state._with(_run=None)
        want, _ = in_chunks([t[:, :, 15:16] for t in tensors], [1], state=fresh, **BOUNDED)
    assert torch.equal(got, want)


@EITHER
def test_a_state_is_a_value(tmp_path, options):
    """Files, copies, pytrees, rows and checkpoints have the biases."""
    tensors = made()
    want, _ = in_chunks(tensors, [20], **options)
    state = in_chunks([t[:, :, :15] for t in tensors], [14, 1], **options)[1]
    save_states(tmp_path / "states", {"layer": state})
    torch.save(state, tmp_path / "state.pt")
    leaves, tree = pytree.tree_flatten(state)
    rows = torch.tensor([1, 0])
    states = {
        "file": load_states(tmp_path / "states")["layer"],
        "torch.load": torch.load(tmp_path / "state.pt"),
        "copy": copy.deepcopy(state),
        "pytree": pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(tree))),
        "rows": state.reorder(rows).reorder(rows),
        "put": state.reorder(rows).put(torch.tensor([0, 1]), state),
        "restored": state.restore(state.checkpoint()),
        "moved": state.to("cpu").detach(),
    }
    later = [t[:, :, 15:] for t in tensors]
    for name, kept in states.items():
        got, _ = in_chunks(later, [1, 1, 3], state=kept, **options)
        torch.testing.assert_close(got, want[:, :, 15:], msg=name)


@EITHER
def test_crop_is_the_prefix(options):
    tensors = made(8)
    options = options | {"window_size": options["window_size"] and 8, "recent": 0}
    state = in_chunks(tensors, [8], **options)[1].crop(3)
    later = [t[:, :, 5:] for t in tensors]
    want = with_bias(dense_dynamic_mask_attention)(*tensors, **options)
    torch.testing.assert_close(in_chunks(later, [1, 2], state=state, **options)[0], want[:, :, 5:])


@pytest.mark.parametrize("kind", ["causal", "threshold", "sliding"])
def test_joined_runs_are_the_run_of_all_tokens(kind):
    (_, *tensors), policy, documents = made(24), Selection(kind, 4, 1, 2), torch.arange(24).expand(2, -1) // 9
    parts = [*(t.split([3, 1, 12, 8], 2) for t in tensors), documents.split([3, 1, 12, 8], 1)]
    runs = [run_of(k, v, g, policy, None, d, b) for k, v, g, b, d in zip(*parts, strict=True)]
    key, value, gate, bias = tensors
    runs.insert(1, empty_run(key, value, gate, policy, bias))
    got = in_order(reduce(joined, runs).state)
    options = {"selection": kind, "window_size": 4, "sinks": 1, "recent": 2, "document_ids": documents}
    want = in_order(in_chunks([tensors[0].repeat(1, 2, 1, 1), *tensors], [24], **options)[1])
    for name in ("position", "bias"):
        assert torch.equal(got[name], want[name])


def test_packed_sequences_leave_states():
    lengths, tensors = [5, 0, 13], [t[:1] for t in made(18)]
    rows = [t[0].transpose(0, 1) for t in tensors]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    attend: Any = dynamic_mask_attention_varlen
    _, states = attend(*rows[:4], ends, bias=rows[4], return_state=True, **BOUNDED)
    later = [t.expand(3, -1, -1, -1)[:, :, :4] if t.dim() == 4 else t.expand(3, -1, -1)[:, :, :4] for t in tensors]
    got, _ = in_chunks(later, [1, 3], state=states, **BOUNDED)
    for number, part in enumerate(zip(*(t.split(lengths, 2) for t in tensors), strict=True)):
        alone = [torch.cat([t, t_later[:1]], 2) for t, t_later in zip(part, later, strict=True)]
        want = with_bias(dense_dynamic_mask_attention)(*alone, **BOUNDED)
        torch.testing.assert_close(got[number], want[0, :, -4:])


@pytest.mark.parametrize("donate", [False, True])
def test_decoding_compiles_once(donate):
    tensors, counter = [t.float() for t in made(30)], CompileCounterWithBackend("aot_eager")
    want = with_bias(dense_dynamic_mask_attention)(*(t.double() for t in tensors), **BOUNDED)

    @torch.compile(fullgraph=True, backend=counter)
    def step(token, state):
        attend = with_bias(dynamic_mask_attention)
        return attend(*token, state=state, return_state=True, donate=donate, **BOUNDED)

    _, state = in_chunks([t[:, :, :25] for t in tensors], [25], **BOUNDED)
    with torch.no_grad():
        for number in range(25, 30):
            output, state = step([t[:, :, number : number + 1].clone() for t in tensors], state)
            torch.testing.assert_close(output.double(), want[:, :, number : number + 1], atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


@EITHER
@torch.no_grad()
def test_biases_are_overwritten_where_a_state_is_donated_and_copied_where_it_is_not(options):
    tensors = made()
    state = in_chunks([t[:, :, :15] for t in tensors], [14, 1], **options)[1].checkpoint()
    before, kept = state.bias.data_ptr(), state.bias.clone()
    token = [t[:, :, 15:16] for t in tensors]
    after = in_chunks(token, [1], state=state, **options)[1]
    assert after.bias.data_ptr() != before
    assert torch.equal(state.bias, kept)
    assert in_chunks(token, [1], state=state, donate=True, **options)[1].bias.data_ptr() == before


@EITHER
def test_a_state_without_biases_holds_none(options):
    *tensors, bias = made()
    state = dynamic_mask_attention(*tensors, return_state=True, **options)[1]
    assert state.bias is None
    assert "bias" not in state.tensors()
    assert len(pytree.tree_leaves(state)) == len(state.tensors())
    with_biases = in_chunks([*tensors, bias], [20], **options)[1]
    assert with_biases.nbytes == state.nbytes + with_biases.bias.nbytes


@EITHER
def test_a_state_with_biases_and_one_without_are_refused_for_each_other(options):
    tensors, attend = [t[:, :, :1] for t in made()], with_bias(dynamic_mask_attention)
    biased, plain = (attend(*tensors[:4], b, return_state=True, **options)[1] for b in (tensors[4], None))
    for state, bias, message in (
        (biased, None, "state: expected a state with no bias, got one with a bias"),
        (plain, tensors[4], "state: expected a state with a bias, got one without bias"),
        (biased, tensors[4].float(), "state: expected bias of torch.float32, got torch.float64"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            attend(*tensors[:4], bias, state=state, **options)
    with pytest.raises(ValueError, match="other: expected a state with no bias, got one with a bias"):
        plain.put(torch.tensor([0, 1]), biased)
    with pytest.raises(TypeError, match=r"bias_dtype: expected torch.float32, .* got torch.bfloat16"):
        DynamicMaskState.empty(1, 2, 4, 5, bias_dtype=torch.bfloat16)
