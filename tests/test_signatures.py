"""Types that users get: mypy checks each `assert_type` and each ignored error, and calls return what the types promise."""

from types import MappingProxyType

import pytest
import torch
from torch import Tensor
from typing_extensions import assert_type, get_type_hints

from flexdma import DynamicMaskAttention, State, dynamic_mask_attention
from flexdma.signatures import AttentionOptions

Q, K, GATE = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6)
OPTIONS: AttentionOptions = {"sinks": 1, "recent": 1, "score_mod": lambda score, b, h, i, j: score.tanh()}


def test_return_state_decides_what_the_operator_returns():
    output = dynamic_mask_attention(Q, K, K, GATE, window_size=2)
    assert isinstance(assert_type(output, Tensor), Tensor)
    output = dynamic_mask_attention(Q, K, K, GATE, window_size=[2, 3], return_state=False, **OPTIONS)
    assert isinstance(assert_type(output, Tensor), Tensor)
    output, state = dynamic_mask_attention(Q, K, K, GATE, window_size=2, return_state=True, **OPTIONS)
    assert isinstance(assert_type(output, Tensor), Tensor)
    assert isinstance(assert_type(state, State), State)
    for kept in (False, True):
        result = dynamic_mask_attention(Q, K, K, GATE, window_size=2, state=state, return_state=kept, **OPTIONS)
        assert_type(result, Tensor | tuple[Tensor, State])
        assert isinstance(result, tuple) == kept


def test_return_state_decides_what_the_layer_returns():
    layer, hidden = DynamicMaskAttention(16, 4, 2, 8, 2), torch.randn(1, 6, 16)
    assert isinstance(assert_type(layer.forward(hidden), Tensor), Tensor)
    output, state = layer.forward(hidden, state=layer.empty_state(1), return_state=True)
    assert isinstance(assert_type(output, Tensor), Tensor)
    assert isinstance(assert_type(state, State), State)
    for kept in (False, True):
        result = layer.forward(hidden, state=state, return_state=kept)
        assert_type(result, Tensor | tuple[Tensor, State])
        assert isinstance(result, tuple) == kept


def test_wrong_types_are_found_before_the_call_and_by_it():
    with pytest.raises(TypeError, match="window_size"):
        dynamic_mask_attention(Q, K, K, GATE)  # type: ignore[call-overload]  # refused
    with pytest.raises(TypeError, match="dropout"):
        dynamic_mask_attention(Q, K, K, GATE, window_size=2, dropout=0.1)  # type: ignore[call-overload]  # refused
    with pytest.raises(ValueError, match="lowering"):
        dynamic_mask_attention(Q, K, K, GATE, window_size=2, lowering=3)  # type: ignore[call-overload]  # refused


def test_kernel_options_are_any_mapping():
    sizes: dict[str, int] = {"BLOCK_M": 64}
    query, key, gate = Q.to("meta"), K.to("meta"), GATE.to("meta")
    for options in (sizes, MappingProxyType(sizes)):
        output = dynamic_mask_attention(query, key, key, gate, window_size=2, lowering="flex", kernel_options=options)
        assert assert_type(output, Tensor).shape == Q.shape


def test_the_options_are_those_of_the_signature():
    named = {"query", "key", "value", "gate", "window_size", "state", "return_state", "return"}
    hints = get_type_hints(dynamic_mask_attention)
    assert get_type_hints(AttentionOptions) == {name: hint for name, hint in hints.items() if name not in named}
