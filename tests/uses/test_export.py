"""torch.export: saved and loaded programs, called at other lengths, give the results of the dense lowering."""

import copy
import io
from typing import Any

import pytest
import torch
from torch.export import Dim, export, load, save
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_leaves

from flexdma import DynamicMaskAttention, dynamic_mask_attention
from flexdma.reference import dense_dynamic_mask_attention
from tests.comparison import inputs

OPTIONS: dict[str, Any] = {"recency": "slope", "qk_norm": True, "sinks": 1, "recent": 2}
LENGTH = {"hidden_states": {0: Dim("batch", min=2, max=64), 1: Dim("length", min=2, max=4096)}}


class Step(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, state):
        return self.layer(hidden_states, state=state, return_state=True)


# Its loader makes tensors of the bytes of a file (torch 2.11).
pytestmark = [
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]
DENSE = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.13",
    reason="torch 2.11 cannot prove min(length, 2 * length) = length and refuses symbolic lengths",
)


def layer(**options):
    """A layer, and the same layer with the dense lowering."""
    made = DynamicMaskAttention(16, 4, 2, 8, 3, **OPTIONS | options)
    torch.nn.init.normal_(made.gate.A)
    dense = copy.deepcopy(made)
    dense.lowering = "dense"
    return made, dense


def exported(module, arguments, **options):
    """The program, saved and loaded.  It has no operator of flexdma, which a process without Python would lack."""
    program = export(module, arguments, **options)
    assert not [node for node in program.graph.nodes if "flexdma" in str(node.target)]
    file = io.BytesIO()
    save(program, file)
    file.seek(0)
    return load(file).module()


@pytest.mark.parametrize(
    ("lowering", "strict"),
    [(None, False), pytest.param(None, True, marks=pytest.mark.slow), pytest.param("dense", False, marks=DENSE)],
)
@torch.no_grad()
def test_inference_at_any_length(lowering, strict):
    attend, dense = layer(lowering=lowering)
    example, options = (torch.randn(2, 9, 16),), {"dynamic_shapes": LENGTH, "strict": strict}
    # Compilers trace a program again, by run_decompositions.  That must not restrict its lengths.
    traced_again = lowering is None and not strict
    program = (
        export(attend, example, **options).run_decompositions().module()
        if traced_again
        else exported(attend, example, **options)
    )
    for batch, length in ((2, 9), (3, 2), (2, 128), (5, 300)):
        hidden = torch.randn(batch, length, 16)
        torch.testing.assert_close(program(hidden), dense(hidden), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ranks", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["ranks", "is a bias"])
@torch.no_grad()
def test_decoding_and_chunks(ranks):
    attend, dense = layer(recency_ranks=ranks)
    state = attend.empty_state(2)
    decode, read = (exported(Step(attend), (torch.randn(2, size, 16), state)) for size in (1, 5))
    hidden, outputs = torch.randn(2, 16, 16), []
    for chunk in hidden.split([5, 1, 5, 1, 1, 1, 1, 1], 1):
        output, state = (decode if chunk.shape[1] == 1 else read)(chunk, state)
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 1), dense(hidden), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lowering", [None, pytest.param("dense", marks=DENSE)])
def test_training(lowering):
    attend, dense = layer(lowering=lowering)
    program = exported(attend, (torch.randn(2, 9, 16),), dynamic_shapes=LENGTH)
    for batch, length in ((3, 150), (2, 40)):
        hidden = torch.randn(batch, length, 16)
        leaves = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        for leaf, module in zip(leaves, (program, dense), strict=True):
            module(leaf).square().sum().backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_masks_documents_and_forget_gates_in_a_batch_of_one():
    attend, dense = layer(recency="forget")
    tokens = {1: LENGTH["hidden_states"][1]}
    shapes = {"hidden_states": tokens, "key_padding_mask": tokens, "document_ids": tokens}

    def example(length):
        masks = {"key_padding_mask": torch.rand(1, length) > 0.2, "document_ids": torch.arange(length)[None] // 50}
        return torch.randn(1, length, 16), masks

    hidden, masks = example(9)
    program = exported(attend, (hidden,), kwargs=masks, dynamic_shapes=shapes)
    for length in (9, 200):
        hidden, masks = example(length)
        torch.testing.assert_close(program(hidden, **masks), dense(hidden, **masks), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_nan_and_infinite_gates_sink_logits_and_rows_without_keys():
    """In blocks of 4 queries.  The first 5 queries see no key."""
    tensors = inputs(2, 4, 2, 30, 30, 4, dtype=torch.float32)
    sink_logits = torch.linspace(-1, 2, 4)

    class Attention(torch.nn.Module):
        def forward(self, *tensors):
            return dynamic_mask_attention(
                *tensors, window_size=5, sink_logits=sink_logits, lowering="gather", block_size=4
            )

    length = {0: Dim("batch", max=64), 2: Dim("length", min=2, max=4096)}
    program = exported(Attention(), tuple(tensors), dynamic_shapes=((length,) * 4,))
    gate = tensors[3]
    gate[..., :5] = float("-inf")
    gate[0, 0, 12], gate[0, 1, 17] = float("nan"), float("inf")
    want = dense_dynamic_mask_attention(*tensors, window_size=5, sink_logits=sink_logits)
    assert 0 < want.isnan().sum() < want.numel()
    torch.testing.assert_close(program(*tensors), want, equal_nan=True)
    assert program(*tensors)[:, :, :5].count_nonzero() == 0


def test_an_unbounded_number_of_keys_is_refused_by_name():
    attend = DynamicMaskAttention(16, 4, 2, 8, None, selection="threshold")
    with pytest.raises(ValueError, match="capacity: expected an int for 'gather' with a symbolic length"):
        export(attend, (torch.randn(2, 9, 16),), dynamic_shapes=LENGTH)


@torch.no_grad()
def test_a_state_is_a_pytree_of_the_program():
    attend, _ = layer()
    program = export(Step(attend), (torch.randn(2, 1, 16), attend.empty_state(2)))
    assert len(program.graph_signature.user_inputs) == 1 + len(tree_leaves(attend.empty_state(2)))
