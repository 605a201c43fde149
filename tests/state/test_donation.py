"""Donated states: their slots are overwritten, the outputs are those of one pass, and no other state changes."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from flexdma import DynamicMaskAttention, DynamicMaskState, dynamic_mask_attention
from flexdma.reference import dense_dynamic_mask_attention
from tests.comparison import inputs

SLOTS = ("key", "value", "gate", "position")
WINDOW = 6


def addresses(state):
    return [getattr(state, name).data_ptr() for name in SLOTS]


def token(tensors, at):
    return [t[:, :, at : at + 1] for t in tensors]


@pytest.mark.parametrize(
    ("options", "compiled"),
    [
        ({}, False),
        ({"sinks": 2}, False),
        ({"sinks": 1, "recent": 2}, False),
        pytest.param({}, True, marks=pytest.mark.slow),
        pytest.param({"sinks": 2}, True, marks=pytest.mark.slow),
        ({"sinks": 1, "recent": 2}, True),
    ],
)
@torch.no_grad()
def test_decoding_writes_into_the_slots_of_the_donated_state(options, compiled):
    tensors = inputs(2, 4, 2, 40, 40, 8, dtype=torch.float32)
    want = dense_dynamic_mask_attention(*(t.double() for t in tensors), window_size=WINDOW, **options)
    counter = CompileCounterWithBackend("inductor")
    step: Any = torch.compile(dynamic_mask_attention, fullgraph=True, backend=counter)
    step = step if compiled else dynamic_mask_attention
    outputs, state = [], DynamicMaskState.empty(2, 2, 8, WINDOW, **options)
    before = addresses(state)
    for at in range(40):
        output, state = step(
            *token(tensors, at), window_size=WINDOW, state=state, return_state=True, donate=True, **options
        )
        outputs.append(output)
        assert addresses(state) == before
    torch.testing.assert_close(torch.cat(outputs, 2).double(), want, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == compiled


@pytest.mark.parametrize("options", [{"window_size": 3}, {"window_size": None, "selection": "threshold"}])
def test_a_state_made_in_inference_mode_is_donated_only_there(options):
    tensors = inputs(1, 4, 2, 9, 9, 4)
    with torch.inference_mode():
        first = [t[:, :, :7] for t in tensors]
        _, state = dynamic_mask_attention(*first, return_state=True, **options)
    given: dict[str, Any] = {"state": state, "return_state": True, **options}
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"donate: expected False outside torch.inference_mode for a state"):
            dynamic_mask_attention(*token(tensors, 7), donate=True, **given)
        want = dynamic_mask_attention(*token(tensors, 7), **given)[0]
    with torch.inference_mode():
        assert torch.equal(dynamic_mask_attention(*token(tensors, 7), donate=True, **given)[0], want)


@pytest.mark.parametrize("donate", [False, True])
@torch.no_grad()
def test_a_dropped_state_is_freed_without_the_garbage_collector(donate):
    tensors = inputs(1, 4, 2, 20, 20, 4)
    options: dict[str, Any] = {"window_size": 3, "return_state": True}
    _, state = dynamic_mask_attention(*(t[:, :, :9] for t in tensors), **options)
    gc.disable()
    try:
        for at in range(9, 20):
            old = [weakref.ref(tensor) for tensor in state.tensors().values()]
            _, state = dynamic_mask_attention(*token(tensors, at), state=state, donate=donate, **options)
            kept = {id(tensor) for tensor in state.tensors().values()}
            assert all(tensor() is None or id(tensor()) in kept for tensor in old)
        last = [weakref.ref(tensor) for tensor in state.tensors().values()]
        del state
        assert all(tensor() is None for tensor in last)
    finally:
        gc.enable()


@torch.no_grad()
def test_a_state_that_is_not_donated_keeps_its_values():
    """Not even where a later state, which may share tensors with it, is donated."""
    tensors = inputs(1, 4, 2, 12, 12, 4)
    options: dict[str, Any] = {"window_size": 3, "sinks": 1}
    masks: dict[str, Any] = {"document_ids": torch.tensor([[7]]), "key_padding_mask": torch.tensor([[False]])}
    _, first = dynamic_mask_attention(*(t[:, :, :6] for t in tensors), return_state=True, **options)
    kept = first.checkpoint()
    _, state = dynamic_mask_attention(*token(tensors, 6), state=first, return_state=True, **options)
    for at in range(7, 12):
        here = masks if at == 9 else {}
        _, state = dynamic_mask_attention(
            *token(tensors, at), state=state, return_state=True, donate=True, **(options | here)
        )
    for name, tensor in first.tensors().items():
        assert torch.equal(tensor, kept.tensors()[name]), name


@torch.no_grad()
def test_a_layer_and_a_score_mod_take_donated_states():
    def distance(score, b, h, i, j):
        return score - 0.1 * (i - j)

    layer = DynamicMaskAttention(16, 4, 2, 8, 3, recency="forget", sinks=1)
    torch.nn.init.normal_(layer.gate.A)
    hidden = torch.randn(2, 20, 16)
    for options in ({}, {"score_mod": distance}):
        state, outputs = layer.empty_state(2), []
        before = addresses(state)
        for one in hidden.split(1, 1):
            output, state = layer(one, state=state, return_state=True, donate=True, **options)
            outputs.append(output)
        assert addresses(state) == before
        torch.testing.assert_close(torch.cat(outputs, 1), layer(hidden, **options), rtol=1e-5, atol=1e-5)


def test_a_donation_that_is_not_possible_is_refused():
    tensors = inputs(1, 4, 2, 5, 5, 4)
    with torch.no_grad():
        _, state = dynamic_mask_attention(*tensors, window_size=3, return_state=True)
    one = token(tensors, 0)

    def call(*tensors, donate: Any = True, state=state, **options):
        return dynamic_mask_attention(*tensors, window_size=3, state=state, donate=donate, **options)

    with pytest.raises(TypeError, match="donate: expected a bool, got 1"):
        call(*one, donate=1, return_state=True)
    for options in ({"return_state": False}, {"return_state": True, "state": None}):
        with pytest.raises(ValueError, match="donate: expected False unless a state is given and returned, got True"):
            call(*one, **options)
    with pytest.raises(ValueError, match="donate: expected False with tensors that need a gradient"):
        call(one[0].requires_grad_(), *one[1:], return_state=True)
    needs = replace(state, key=state.key.clone().requires_grad_())
    with torch.no_grad(), pytest.raises(ValueError, match="donate: expected False with tensors that need a gradient"):
        call(*one, state=needs, return_state=True)
    strided = replace(state, key=state.key.mT.contiguous().mT)
    with pytest.raises(ValueError, match="donate: expected False for a state whose key is not contiguous"):
        call(*token(tensors, 1), state=strided, return_state=True)
    with pytest.raises(ValueError, match=r"donate: expected False inside torch\.func"):
        torch.func.vmap(lambda query: call(query, *one[1:], return_state=True)[0])(one[0].detach()[None])
