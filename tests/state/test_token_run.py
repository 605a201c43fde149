"""Runs of decoded tokens on a CPU: the outputs and states are those of one pass."""

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdma import DynamicMaskState, State, dynamic_mask_attention
from flexdma.reference import dense_dynamic_mask_attention
from flexdma.state import head_keys, token_run
from tests.comparison import inputs
from tests.lifespans.gate_strategies import gates

LENGTH = 60


def token(tensors, at):
    return [t[:, :, at : at + 1] for t in tensors]


def contents(state):
    """The kept keys in order of position, and the small tensors."""
    order = state.position.argsort(-1)
    slots = {name: getattr(state, name) for name in ("key", "value", "gate", "position")}
    rows = {name: t.gather(2, (order if t.dim() == 3 else order[..., None].expand_as(t))) for name, t in slots.items()}
    names = ("length", "real_length", "last_padding", "document", "last_sink", "last_loss", "forgotten")
    return rows | {name: getattr(state, name) for name in names}


@pytest.mark.parametrize("found", [2, 32])
@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"window_size": 6},
        {"window_size": (2, 7), "sinks": 2},
        {"window_size": 5, "sinks": 1, "selection": "threshold"},
        {"window_size": 1},
        {"window_size": (2, 7), "sinks": 2, "recent": 4},
        {"window_size": (12, 3), "sinks": 1, "recent": 5, "selection": "threshold"},
        {"window_size": 2, "recent": 20},
        {"window_size": (2, 7), "sinks": 2, "recent": 4, "selection": "sliding"},
    ],
)
@torch.no_grad()
def test_a_run_is_one_pass(options, donate, found, monkeypatch):
    monkeypatch.setattr(head_keys, "COUNT", found)
    query, key, value, gate = inputs(2, 4, 2, LENGTH, LENGTH, 8, dtype=torch.float32)
    gate = (2 * gate).round() / 2  # ties
    gate[0, 0, 40] = float("nan")
    gate[1, 1, [20, 21]] = torch.tensor([float("-inf"), float("inf")])
    tensors: Any = (query, key, value, gate)
    want = dense_dynamic_mask_attention(*(t.double() for t in tensors), **options)
    _, state_of_one_pass = dynamic_mask_attention(*tensors, return_state=True, **options)
    empty = DynamicMaskState.empty(2, 2, 8, **options)
    state, outputs = empty, []
    with mock.patch.object(token_run.TokenRun, "_sort", autospec=True, side_effect=token_run.TokenRun._sort) as sort:
        for at in range(LENGTH):
            if not donate:  # another token after the same state
                dynamic_mask_attention(*token(tensors, (at + 3) % LENGTH), state=state, return_state=True, **options)
            output, state = dynamic_mask_attention(
                *token(tensors, at), state=state, return_state=True, donate=donate, **options
            )
            outputs.append(output)
    assert sort.call_count < LENGTH + LENGTH * (not donate) or found == 2
    torch.testing.assert_close(torch.cat(outputs, 2).double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)
    expected = contents(state_of_one_pass)
    for name, tensor in contents(state).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert donate or not (empty.position >= 0).any()


@pytest.mark.parametrize("options", [{"window_size": 6}, {"window_size": [2, 7], "sinks": 2, "recent": 4}])
@pytest.mark.parametrize("with_gates", [False, True])
@torch.no_grad()
def test_a_sliding_window_is_a_run_where_no_token_of_it_is_masked(options, with_gates):
    query, key, value, gate = inputs(2, 4, 2, LENGTH, LENGTH, 8, dtype=torch.float32)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, :3] = mask[1, 20:22] = False
    documents = (torch.arange(LENGTH) // 25).expand(2, -1)
    gate[:, :, :50] = 0.0  # with other gates a token is none of a run
    tensors: Any = (query, key, value, gate if with_gates else None)
    options = {**options, "selection": "sliding"}
    want = dense_dynamic_mask_attention(*tensors, key_padding_mask=mask, document_ids=documents, **options)
    attend: Any = dynamic_mask_attention
    state, outputs, runs = None, [], 0
    with mock.patch.object(
        token_run.TokenRun, "insert", autospec=True, side_effect=token_run.TokenRun.insert
    ) as insert:
        for at in range(LENGTH):
            part = [None if t is None else t[:, :, at : at + 1] for t in tensors]
            masks = {"key_padding_mask": mask[:, at : at + 1], "document_ids": documents[:, at : at + 1]}
            output, state = attend(*part, state=state, return_state=True, donate=at > 0, **masks, **options)
            outputs.append(output)
        runs = insert.call_count
    assert runs > LENGTH / 2
    torch.testing.assert_close(torch.cat(outputs, 2), want, rtol=1e-5, atol=1e-5)
    _, expected = attend(*tensors, return_state=True, key_padding_mask=mask, document_ids=documents, **options)
    for name, tensor in contents(state).items():
        torch.testing.assert_close(tensor, contents(expected)[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("found", [1, 32])
@pytest.mark.parametrize("window", [5, (2, 7)])
@torch.no_grad()
def test_a_run_begins_where_some_of_the_recent_tokens_are_masked(window, found, monkeypatch):
    """Positions without a key among the recent ones have empty slots, which no other key takes."""
    monkeypatch.setattr(head_keys, "COUNT", found)
    query, key, value, gate = inputs(2, 4, 2, LENGTH, LENGTH, 8, dtype=torch.float32)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, [0, 1, 9, 11, 30]] = mask[1, [5, 6, 7, 30, 32]] = False
    gate[0, 1, [12, 40]] = gate[1, 0, 33] = -torch.inf
    options: dict[str, Any] = {"window_size": window, "sinks": 2, "recent": 6}
    tensors: Any = (query, key, value, gate)
    want = dense_dynamic_mask_attention(*tensors, key_padding_mask=mask, **options)
    state, outputs = None, []
    insert = token_run.TokenRun.insert
    with mock.patch.object(token_run.TokenRun, "insert", autospec=True, side_effect=insert) as inserted:
        for at in range(LENGTH):
            output, state = dynamic_mask_attention(
                *token(tensors, at), state=state, return_state=True, donate=at > 0,
                key_padding_mask=mask[:, at : at + 1], **options,
            )  # fmt: skip
            outputs.append(output)
    assert inserted.call_count > 40
    torch.testing.assert_close(torch.cat(outputs, 2), want, rtol=1e-5, atol=1e-5)
    _, expected = dynamic_mask_attention(*tensors, return_state=True, key_padding_mask=mask, **options)
    for name, tensor in contents(expected).items():
        torch.testing.assert_close(contents(state)[name], tensor, rtol=0, atol=0, msg=name)


@given(gates(max_length=30), st.data())
@torch.no_grad()
def test_a_run_whose_state_is_seldom_read_is_one_pass(gate, data):
    heads, length = gate.shape[1:]
    sizes = st.integers(1, 8)
    options: dict[str, Any] = {
        "window_size": tuple(data.draw(sizes) for _ in range(heads)) if heads > 1 else data.draw(sizes),
        "sinks": data.draw(st.integers(0, 3)),
        "recent": data.draw(st.integers(0, 10)),
        "selection": data.draw(st.sampled_from(["causal", "threshold"])),
    }
    # Two sequences.  The specification adds gates without a reference, so its rounding error grows with the gate.
    gate = torch.cat([gate, gate.roll(3, -1)])
    gate = torch.where(gate == -torch.inf, gate, gate.clamp(-1e3, 1e3)).double()
    tensors: Any = (*inputs(2, 2 * heads, heads, length, length, 4)[:3], gate)
    want = dense_dynamic_mask_attention(*tensors, **options)
    begin, reads = data.draw(st.integers(0, length)), data.draw(st.sets(st.integers(0, length), max_size=2))
    state = DynamicMaskState.empty(2, heads, 4, dtype=torch.float64, gate_dtype=torch.float64, **options)
    if begin:
        _, state = dynamic_mask_attention(*(t[:, :, :begin] for t in tensors), return_state=True, **options)
    run = None
    with mock.patch.object(head_keys, "COUNT", data.draw(st.sampled_from([1, 3, 32]))):
        for at in range(begin, length):
            query, *new = token(tensors, at)
            run = token_run.run_of(state) if run is None else run
            if run is not None and run.insert(*new):
                output = run.attention(query, 0.5)
            else:
                state = state if run is None else run.state()
                run = None
                # A score_mod keeps this token out of runs.
                output, state = dynamic_mask_attention(
                    query, *new, state=state, return_state=True, score_mod=lambda score, *_: score, **options
                )
            torch.testing.assert_close(output, want[:, :, at : at + 1], equal_nan=True, rtol=1e-9, atol=1e-9)
            if run is not None and (at in reads or at == length - 1):
                state = run.state()
                prefix = dynamic_mask_attention(*(t[:, :, : at + 1] for t in tensors), return_state=True, **options)[1]
                torch.testing.assert_close(contents(state), contents(prefix), equal_nan=True, rtol=0, atol=0)


@torch.no_grad()
def test_a_value_that_is_not_finite_leaves_with_its_key():
    query, key, value, _ = inputs(1, 2, 1, 6, 6, 4)
    gate = torch.tensor(
        [[[5.0, 1.0, 1.0, 9.0, 0.0, 0.0]]]
    )  # the fourth token replaces the first, and the second expires
    key[:, :, 1], value[:, :, 1] = torch.inf, torch.nan
    state: State = DynamicMaskState.empty(1, 1, 4, 1, recent=2, dtype=torch.float64)
    finite = []
    for at in range(6):
        output, state = dynamic_mask_attention(
            *token((query, key, value, gate), at), window_size=1, recent=2, state=state, return_state=True, donate=True
        )
        finite.append(bool(output.isfinite().all()))
    assert finite == [True, False, False, True, True, True]


@torch.no_grad()
def test_the_number_subtracted_from_gates_falls_with_a_best_gate_that_expires():
    """Below a threshold keys are only recent.  Float32 rounds a difference of a million by 0.06."""
    query, key, value, gate = inputs(1, 4, 2, LENGTH, LENGTH, 8, dtype=torch.float32)
    gate = gate.double() - 1e6
    gate[:, :, 40] = -1.0
    options: dict[str, Any] = {"window_size": 4, "recent": 6, "selection": "threshold"}
    want = dense_dynamic_mask_attention(query.double(), key.double(), value.double(), gate, **options)
    state = DynamicMaskState.empty(1, 2, 8, gate_dtype=torch.float64, **options)
    for at in range(LENGTH):
        output, state = dynamic_mask_attention(
            *token((query, key, value, gate), at), state=state, return_state=True, donate=True, **options
        )
        torch.testing.assert_close(output.double(), want[:, :, at : at + 1], rtol=1e-5, atol=1e-5)


def test_a_run_of_inference_mode_goes_on_outside_of_it():
    tensors = inputs(1, 4, 2, LENGTH, LENGTH, 8, dtype=torch.float32)
    options: dict[str, Any] = {"window_size": 8, "recent": 4}
    want, state = dynamic_mask_attention(*(t[:, :, :58] for t in tensors), return_state=True, **options)
    for at, mode in ((58, torch.inference_mode()), (59, torch.no_grad())):
        with mode:
            output, state = dynamic_mask_attention(
                *token(tensors, at), state=state, return_state=True, donate=True, **options
            )
    want = dense_dynamic_mask_attention(*(t.double() for t in tensors), **options)
    torch.testing.assert_close(output.double(), want[:, :, -1:], rtol=1e-5, atol=1e-5)


def test_a_state_of_inference_mode_goes_on_outside_of_it():
    tensors = inputs(1, 4, 2, LENGTH, LENGTH, 8, dtype=torch.float32)
    want = dense_dynamic_mask_attention(*(t.double() for t in tensors), window_size=8)
    with torch.inference_mode():
        _, state = dynamic_mask_attention(*(t[:, :, :58] for t in tensors), window_size=8, return_state=True)
    with torch.no_grad():
        for at in (58, 59):
            output, state = dynamic_mask_attention(*token(tensors, at), window_size=8, state=state, return_state=True)
    torch.testing.assert_close(output.double(), want[:, :, 59:60], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_writing_to_a_state_between_tokens_ends_its_run():
    tensors = inputs(1, 4, 2, LENGTH, LENGTH, 8, dtype=torch.float32)
    options: dict[str, Any] = {"window_size": 8, "return_state": True}
    _, state = dynamic_mask_attention(*(t[:, :, :40] for t in tensors), **options)
    _, state = dynamic_mask_attention(*token(tensors, 40), state=state, donate=True, **options)
    state.gate.neg_()
    fresh = state.checkpoint()
    for at in range(41, 45):
        output, state = dynamic_mask_attention(*token(tensors, at), state=state, donate=True, **options)
    # Chunks are computed by the operator, without runs.
    want, fresh = dynamic_mask_attention(*(t[:, :, 41:45] for t in tensors), state=fresh, **options)
    torch.testing.assert_close(output, want[:, :, -1:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(contents(state), contents(fresh), rtol=0, atol=0)


@torch.no_grad()
def test_a_token_after_a_run_is_checked():
    tensors = inputs(1, 4, 2, LENGTH, LENGTH, 8, dtype=torch.float32)
    _, state = dynamic_mask_attention(*(t[:, :, :40] for t in tensors), window_size=8, return_state=True)

    def step(query, key, value, gate, **options):
        return dynamic_mask_attention(query, key, value, gate, state=state, return_state=True, **options)

    _, state = step(*token(tensors, 40), window_size=8)
    query, key, value, gate = token(tensors, 41)
    for window in (9, 8.0, True):
        with pytest.raises((ValueError, TypeError), match="window_size"):
            step(query, key, value, gate, window_size=window)
    with pytest.raises(TypeError, match="sinks: expected an int, got bool"):
        step(query, key, value, gate, window_size=8, sinks=False)
    with pytest.raises(TypeError, match=r"key: expected torch\.float32 as query has, got torch\.float64"):
        step(query, key.double(), value, gate, window_size=8)
    with pytest.raises(ValueError, match="query: expected a multiple of key's 2 heads, got 3 heads"):
        step(query[:, :3], key, value, gate, window_size=8)
    windows: dict[str, Any] = {"window_size": (8, 1), "return_state": True}
    _, of_windows = dynamic_mask_attention(*(t[:, :, :40] for t in tensors), **windows)
    _, of_windows = dynamic_mask_attention(*token(tensors, 40), state=of_windows, **windows)
    with pytest.raises(TypeError, match="window_size"):
        dynamic_mask_attention(*token(tensors, 41), state=of_windows, window_size=(8, True), return_state=True)
    with pytest.raises(ValueError, match="donate: expected False unless a state is given and returned"):
        dynamic_mask_attention(query, key, value, gate, state=state, window_size=8, donate=True)
