"""One pass = chunks of any sizes = token by token: outputs, states and gradients."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdma import dynamic_mask_attention
from tests.comparison import inputs
from tests.gate_strategies import gates, selections


def run(tensors, sizes, *, state=None, detached=False, key_padding_mask=None, document_ids=None, **options):
    """Outputs of consecutive chunks of these sizes, and the state after them."""
    outputs, start = [], 0
    for size in sizes:
        chunk = [t[:, :, start : start + size] for t in tensors]
        masks = {"key_padding_mask": key_padding_mask, "document_ids": document_ids}
        masks = {name: None if mask is None else mask[:, start : start + size] for name, mask in masks.items()}
        output, state = dynamic_mask_attention(*chunk, state=state, return_state=True, **masks, **options)
        state = state.detach() if detached else state
        outputs.append(output)
        start += size
    return torch.cat(outputs, 2), state


def held(state):
    """The positions that each row and head holds, as sets."""
    return [[set(row[row >= 0].tolist()) for row in rows] for rows in state.position]


@st.composite
def splits(draw, length):
    """Sizes of consecutive chunks that make up the length; often single tokens."""
    sizes = []
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
    options["selection"] = data.draw(st.sampled_from(["causal", "threshold"]))
    query, key, value, _gate = inputs(1, 4, heads, length, length, 4)
    tensors = (query, key, value, gate.double().nan_to_num(nan=torch.nan, posinf=50.0, neginf=-torch.inf))
    whole = dynamic_mask_attention(*tensors, lowering="dense", **options)
    split, state = run(tensors, data.draw(splits(length)), **options)
    torch.testing.assert_close(split, whole, equal_nan=True, rtol=1e-9, atol=1e-9)
    assert held(state) == held(run(tensors, [length], **options)[1])
    assert held(state) == held(run(tensors, [1] * length, **options)[1])
