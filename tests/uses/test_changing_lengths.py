"""Compiled calls at many lengths, larger and smaller than a block: few compilations, and right results at each."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from flexdma import DynamicMaskAttention, dynamic_mask_attention
from flexdma.lowerings.plain import BLOCK_SIZE
from tests.comparison import assert_same, gradients_of, inputs

LENGTHS = (51, 60, 300, 9)
# With these there are more than eight lengths, the limit of torch.compile for compilations of one function.
MORE = (BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE, 1000, 52, 7, 640)


def counted(function, backend="inductor", **options):
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def attend(*tensors, **options):
    return dynamic_mask_attention(*tensors, **options)


def test_training_at_more_lengths_than_torch_recompiles_for():
    compiled, counter = counted(attend)
    for length in LENGTHS + MORE:
        tensors = inputs(2, 4, 2, length, length, 16, dtype=torch.float32, seed=length)
        assert_same(compiled, tensors, tolerance=2e-5, window_size=6)
    assert counter.frame_count == 2  # the first length, others


@pytest.mark.slow
def test_traced_training_is_compiled_five_times_at_most():
    """Also with lengths of whole blocks, for which slices of rows are contiguous, which torch guards."""
    compiled, counter = counted(attend, "aot_eager")
    for length in (*LENGTHS, BLOCK_SIZE, 2 * BLOCK_SIZE, 1000):
        tensors = inputs(2, 4, 2, length, length, 16, dtype=torch.float32, seed=length)
        assert_same(compiled, tensors, tolerance=2e-5, window_size=6, score_mod=lambda s, b, h, i, j: s.tanh())
    assert counter.frame_count <= 5


def test_inference_at_more_lengths_than_torch_recompiles_for():
    compiled, counter = counted(attend)
    for length in LENGTHS + MORE:
        tensors = inputs(1, 4, 2, length, length, 16, dtype=torch.float32, seed=length)
        assert_same(compiled, tensors, tolerance=2e-5, gradients=False, window_size=20)
    assert counter.frame_count <= 3


@pytest.mark.slow
def test_inference_that_the_fused_kernel_does_not_serve():
    """Unequal head sizes and a score_mod are traced."""
    compiled, _ = counted(attend, "aot_eager", dynamic=True)
    for length in (51, 300, 129):
        tensors = inputs(2, 4, 2, length, length, 16, 8, dtype=torch.float32)
        options = {"window_size": 6, "score_mod": lambda s, b, h, i, j: s - 0.1 * (i - j)}
        assert_same(compiled, tensors, tolerance=2e-5, gradients=False, **options)


@pytest.mark.slow
def test_a_layer_reads_chunks_of_any_length():
    layer = DynamicMaskAttention(32, 4, 2, 16, 9, recency="slope", recent=2)
    torch.nn.init.normal_(layer.gate.A)
    hidden = torch.randn(2, 600, 32)
    compiled, counter = counted(layer)
    with torch.no_grad():
        want, pieces, state = layer(hidden), [], layer.empty_state(2)
        for piece in hidden.split([60, 61, 200, 7, 130, 50, 29, 3, 11, 49], 1):
            output, state = compiled(piece, state=state, return_state=True)
            pieces.append(output)
    torch.testing.assert_close(torch.cat(pieces, 1), want, atol=1e-5, rtol=1e-4)
    assert counter.frame_count <= 3


def test_a_batch_of_padded_rows_trains():
    layer = DynamicMaskAttention(32, 4, 2, 16, 9, recency="slope")
    compiled, counter = counted(layer, "aot_eager")
    for length in (40, 41, 90):
        hidden, mask = torch.randn(2, length, 32), torch.arange(length) < torch.tensor([[length], [length - 7]])
        results = []
        for function in (layer, compiled):
            layer.zero_grad()
            function(hidden, key_padding_mask=mask)[mask].square().sum().backward()
            results.append(gradients_of(layer.parameters()))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)
    assert counter.frame_count == 2
