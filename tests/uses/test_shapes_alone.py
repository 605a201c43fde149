"""Meta and fake tensors, which have no values: the shapes and dtypes of the real call, without reading values."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flexdma import DynamicMaskAttention, DynamicMaskState, dynamic_mask_attention
from flexdma.block_masks import dynamic_block_mask
from flexdma.integrations.transformers import DynamicMaskCache, convert_to_dma
from tests.comparison import gradients_of
from tests.integrations.hf_models import CACHE, causal_lm

OPTIONS = [
    {"window_size": 3},
    {"window_size": [3, 4], "sinks": 1, "recent": 2, "score_mod": lambda score, b, h, q_idx, kv_idx: 2 * score},
    {"window_size": None, "selection": "threshold"},
    {"window_size": 3, "selection": "global"},
]


@pytest.fixture(params=["meta", "fake"])
def device(request):
    """The device of the test's tensors."""
    with FakeTensorMode() if request.param == "fake" else contextlib.nullcontext():
        yield "meta" if request.param == "meta" else "cpu"


def tensors(device, gradient, queries=70, dtype=torch.bfloat16):
    made = [
        torch.empty(2, 4, queries, 8, dtype=dtype, device=device),
        torch.empty(2, 2, 70, 8, dtype=dtype, device=device),
    ]
    made += [torch.empty_like(made[1]), torch.empty(2, 2, 70, device=device)]
    return [tensor.requires_grad_(gradient) for tensor in made]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lowering", [None, "gather", "dense", "flex"])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_operator(device, options, lowering, gradient):
    leaves = tensors(device, gradient, queries=60)
    output = dynamic_mask_attention(*leaves, lowering=lowering, **options)
    assert (output.shape, output.dtype, output.device.type) == ((2, 4, 60, 8), torch.bfloat16, device)
    if gradient:
        output.sum().backward()
        assert [leaf.grad.shape for leaf in leaves] == [leaf.shape for leaf in leaves]


@pytest.mark.parametrize("options", OPTIONS[:2])
def test_a_state(device, options):
    _, state = dynamic_mask_attention(*tensors(device, False), return_state=True, **options)
    options_of_state = {name: value for name, value in options.items() if name != "score_mod"}
    fresh = DynamicMaskState.empty(2, 2, 8, dtype=torch.bfloat16, device=device, **options_of_state)
    for size in (1, 5):
        chunk = [tensor[:, :, :size] for tensor in tensors(device, False)]
        output, state = dynamic_mask_attention(*chunk, state=state, return_state=True, **options)
        assert (output.shape, output.dtype) == ((2, 4, size, 8), torch.bfloat16)
        for name, tensor in state.reorder(torch.arange(2, device=device)).tensors().items():
            like = getattr(fresh, name)
            assert (tensor.shape, tensor.dtype, tensor.device) == (like.shape, like.dtype, like.device), name


@pytest.mark.parametrize("recency", [None, "slope", "forget"])
def test_a_layer(device, recency):
    with torch.device(device):
        layer = DynamicMaskAttention(16, 4, 2, 8, 3, recency=recency, qk_norm=True)
        state = layer.empty_state(2, device=device)
        for size in (9, 1):
            output, state = layer(torch.empty(2, size, 16), state=state, return_state=True)
            assert (output.shape, output.dtype) == ((2, size, 16), torch.float32)
        layer(torch.empty(2, 9, 16)).sum().backward()
    assert [g.shape for g in gradients_of(layer.parameters())] == [p.shape for p in layer.parameters()]


def test_a_block_mask(device):
    block_mask = dynamic_block_mask(torch.empty(2, 2, 300, device=device), 9, num_query_heads=4)
    assert block_mask.shape == (2, 4, 300, 300)
    assert block_mask.kv_indices.shape == (2, 4, 3, 3)


@torch.no_grad()
def test_a_converted_model_of_fake_tensors():
    """Not with meta tensors, whose position_ids transformers itself reads."""
    with FakeTensorMode():
        model = convert_to_dma(causal_lm("Llama"), window_size=4)
        tokens = torch.ones(2, 9, dtype=torch.int64)
        assert model(tokens, use_cache=False).logits.shape == (2, 9, 64)
        cache = DynamicMaskCache()
        for count in (9, 1):
            assert model(tokens[:, :count], **{CACHE: cache}).logits.shape == (2, count, 64)
        keys = cache.layers[0].keys
        assert keys is not None
        assert keys.shape == (2, 2, 4, 8)
        ends = torch.tensor([0, 4, 9], dtype=torch.int32)
        assert model(tokens[:1], cu_seq_lens_q=ends, cu_seq_lens_k=ends).logits.shape == (1, 9, 64)
