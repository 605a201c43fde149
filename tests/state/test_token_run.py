"""Runs of decoded tokens on a CPU: the outputs and states are those of one pass."""

from typing import Any
from unittest import mock

import pytest
import torch

from flexdma import DynamicMaskState, dynamic_mask_attention
from flexdma.reference import dense_dynamic_mask_attention
from flexdma.state import token_run
from tests.comparison import inputs

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
    ],
)
@torch.no_grad()
def test_a_run_is_one_pass(options, donate, found, monkeypatch):
    monkeypatch.setattr(token_run, "COUNT", found)
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
            output, state = dynamic_mask_attention(
                *token(tensors, at), state=state, return_state=True, donate=donate, **options
            )
            outputs.append(output)
    assert sort.call_count < LENGTH or found == 2
    torch.testing.assert_close(torch.cat(outputs, 2).double(), want, rtol=1e-5, atol=1e-5, equal_nan=True)
    expected = contents(state_of_one_pass)
    for name, tensor in contents(state).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert donate or not (empty.position >= 0).any()


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
    with pytest.raises(ValueError, match="donate: expected False unless a state is given and returned"):
        dynamic_mask_attention(query, key, value, gate, state=state, window_size=8, donate=True)
