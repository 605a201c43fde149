"""torch.export: saved and loaded programs, called at other lengths, give the results of the dense lowering."""

import copy
import io
from typing import Any

import pytest
import torch
from torch.export import Dim, export, load, save
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_leaves

from flexdma import DynamicMaskAttention

OPTIONS: dict[str, Any] = {"recency": "slope", "qk_norm": True, "sinks": 1, "recent": 2}
LENGTH = {"hidden_states": {0: Dim("batch", min=2, max=64), 1: Dim("length", min=2, max=4096)}}


class Step(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, state):
        return self.layer(hidden_states, state=state, return_state=True)


# Its loader makes tensors of the bytes of a file (torch 2.11).
pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")
DENSE = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13",
    reason="torch 2.11 cannot prove min(length, 2 * length) = length and refuses symbolic lengths",
)


def layer(**options):
    """A layer, and the same layer with the dense lowering."""
    made = DynamicMaskAttention(16, 4, 2, 8, 3, **OPTIONS, **options)
    torch.nn.init.normal_(made.gate.A)
    dense = copy.deepcopy(made)
    dense.lowering = "dense"
    return made, dense


def exported(module, arguments, **options):
    file = io.BytesIO()
    save(export(module, arguments, **options), file)
    file.seek(0)
    return load(file).module()


@pytest.mark.parametrize(
    ("lowering", "strict"), [(None, False), (None, True), pytest.param("dense", False, marks=DENSE)]
)
@torch.no_grad()
def test_inference_at_any_length(lowering, strict):
    attend, dense = layer(lowering=lowering)
    program = exported(attend, (torch.randn(2, 9, 16),), dynamic_shapes=LENGTH, strict=strict)
    for batch, length in ((2, 9), (3, 2), (2, 128), (5, 300)):
        hidden = torch.randn(batch, length, 16)
        torch.testing.assert_close(program(hidden), dense(hidden), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decoding_and_chunks():
    attend, dense = layer()
    state = attend.empty_state(2)
    decode, read = (exported(Step(attend), (torch.randn(2, size, 16), state)) for size in (1, 5))
    hidden, outputs = torch.randn(2, 16, 16), []
    for chunk in hidden.split([5, 1, 5, 1, 1, 1, 1, 1], 1):
        output, state = (decode if chunk.shape[1] == 1 else read)(chunk, state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), dense(hidden), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lowering", [None, pytest.param("dense", marks=DENSE)])
def test_training(lowering):
    """The traced gather at one length, the dense lowering at any."""
    attend, dense = layer(lowering=lowering)
    shapes = {"hidden_states": {0: LENGTH["hidden_states"][0]}} if lowering is None else LENGTH
    program = exported(attend, (torch.randn(2, 150, 16),), dynamic_shapes=shapes)
    for batch, length in ((3, 150),) if lowering is None else ((3, 150), (2, 40)):
        hidden = torch.randn(batch, length, 16)
        leaves = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        for leaf, module in zip(leaves, (program, dense), strict=True):
            module(leaf).square().sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_training_at_symbolic_lengths_is_refused_by_name(strict):
    attend, _ = layer()
    with pytest.raises(Exception, match=r"'gather' exports symbolic lengths only .* expected torch\.no_grad\(\)"):
        export(attend, (torch.randn(2, 9, 16),), dynamic_shapes=LENGTH, strict=strict)


@torch.no_grad()
def test_a_state_is_a_pytree_of_the_program():
    attend, _ = layer()
    program = export(Step(attend), (torch.randn(2, 1, 16), attend.empty_state(2)))
    assert len(program.graph_signature.user_inputs) == 1 + len(tree_leaves(attend.empty_state(2)))
