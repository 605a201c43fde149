"""A batch without sequences: outputs, gradients and states of the right shapes and dtypes, eager and traced."""

from typing import Any

import pytest
import torch

from flexdma import DynamicMaskAttention, DynamicMaskState, dynamic_mask_attention, load_states, save_states
from tests.comparison import gradients_of

OPTIONS: list[dict[str, Any]] = [
    {},
    {"sinks": 1, "recent": 2, "score_mod": lambda score, b, h, q_idx, kv_idx: score + (q_idx - kv_idx)},
    {"selection": "global", "document_ids": torch.zeros(0, 9, dtype=torch.int64)},
    {"selection": "threshold", "window_size": None, "key_padding_mask": torch.ones(0, 9, dtype=torch.bool)},
]
EVERYTHING: dict[str, Any] = {"sinks": 1, "recent": 2, "recency": "forget"}
NO_ROWS = torch.zeros(0, dtype=torch.int64)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lowering", ["gather", "dense", "flex"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_operator(options, lowering, compiled):
    attend = (
        torch.compile(dynamic_mask_attention, fullgraph=True, backend="eager") if compiled else dynamic_mask_attention
    )
    shapes = [(0, 4, 7, 8), (0, 2, 9, 8), (0, 2, 9, 8), (0, 2, 9)]
    tensors = [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    options = {"window_size": 3, "lowering": lowering, **options}
    with torch.no_grad():
        outputs = [attend(*tensors, **options)]
    outputs.append(attend(*tensors, **options))
    for output in outputs:
        assert (output.shape, output.dtype) == ((0, 4, 7, 8), torch.bfloat16)
    outputs[1].sum().backward()
    assert [gradient.shape for gradient in gradients_of(tensors)] == shapes


@pytest.mark.parametrize(
    ("compiled", "options"), [(False, {}), (False, EVERYTHING), (True, EVERYTHING)], ids=["plain", "all", "compiled"]
)
def test_a_batch_that_all_sequences_have_left_goes_on(compiled, options, tmp_path):
    layer = DynamicMaskAttention(16, 4, 2, 8, 3, **options)
    attend = torch.compile(layer, fullgraph=True, backend="eager") if compiled else layer
    with torch.no_grad():
        _, full = layer(torch.randn(3, 9, 16), return_state=True)
    save_states(tmp_path / "states", {"left": full.reorder(NO_ROWS)})
    for empty in (full.reorder(NO_ROWS), load_states(tmp_path / "states")["left"], layer.empty_state(0)):
        for tokens in (1, 5):
            for mode in (torch.no_grad,) if compiled else (torch.no_grad, torch.enable_grad):
                with mode():
                    output, after = attend(torch.randn(0, tokens, 16), state=empty, return_state=True)
                assert output.shape == (0, tokens, 16)
                for name, tensor in after.tensors().items():
                    like = getattr(full, name)
                    assert (tensor.shape, tensor.dtype) == ((0, *like.shape[1:]), like.dtype), name
                assert after.crop(0).length.shape == (0,)
                assert torch.equal(full.put(NO_ROWS, after).key, full.key)


def test_a_state_of_no_sequences_may_be_made_and_one_of_fewer_not():
    assert DynamicMaskState.empty(0, 2, 4, 3).key.shape == (0, 2, 3, 4)
    with pytest.raises(ValueError, match="batch_size: expected at least 0, got -1"):
        DynamicMaskState.empty(-1, 2, 4, 3)
