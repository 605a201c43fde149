"""Attention under a dense mask, and the checks of a BlockMask against it."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention

from flexdma.packing.block_index import BlockIndex
from tests.lowerings.uncompiled_flex import gradients_on_a_cpu
from tests.recipes.test_block_masks import blocks_of, listed

NAMES = ("output", "query", "key", "value")
uncompiled = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def dense_attention(query, key, value, mask):
    """Masked attention in one Q x K matrix; 0 where a query sees no key.  mask: [B, Hq, Q, K]."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1).masked_fill(~mask, 0.0) @ value


def check_mask(block_mask, dense, *, exact=True):
    """The mask_mod is the dense mask, every visible pair is in a listed block, and full blocks need no mask."""
    batch, query_heads, queries, keys = dense.shape
    assert torch.equal(create_mask(block_mask.mask_mod, batch, query_heads, queries, keys, device="cpu"), dense)
    rows, columns = block_mask.BLOCK_SIZE
    some, every = blocks_of(dense, rows, columns)
    lists = BlockIndex(
        block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.full_kv_num_blocks, block_mask.full_kv_indices
    )
    partial = listed(*lists[:2], some.shape[-1])
    full = listed(*lists[2:4], some.shape[-1])
    assert not (partial & full).any()
    assert not (some & ~partial & ~full).any()
    assert not (full & ~every).any()
    if exact:
        assert torch.equal(partial | full, some)
        assert torch.equal(full, some & every)
    assert torch.equal(listed(block_mask.q_num_blocks, block_mask.q_indices, some.shape[-2]), partial.mT)
    assert torch.equal(listed(block_mask.full_q_num_blocks, block_mask.full_q_indices, some.shape[-2]), full.mT)


def check_attention(block_mask, dense, query, key, value):
    """Uncompiled FlexAttention under the BlockMask equals attention under the dense mask, with gradients."""
    results = []
    for attend in (
        lambda q, k, v: flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True),
        lambda q, k, v: dense_attention(q, k, v, dense),
    ):
        leaves = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
        with gradients_on_a_cpu():
            output = attend(*leaves)
            results.append([output.detach(), *torch.autograd.grad(output.square().sum(), leaves)])
    for name, got, want in zip(NAMES, *results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10, msg=name)


def heads(batch, query_heads, kv_heads, queries, keys, size=8, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, value in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape_of_keys = (batch, kv_heads, keys, size)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(batch, query_heads, queries, size), normal(*shape_of_keys), normal(*shape_of_keys)
