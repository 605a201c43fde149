"""Recipes against the code that others publish: flash-linear-attention, MoBA's and SeerAttention's own.

Each package needs an environment of its own, so each test skips without it.
"""

import importlib
import warnings

import pytest
import torch

from flexdma.block_masks import SeerGate, moba_block_mask, nsa_block_mask, nsa_selection
from flexdma.block_masks.routed import cell_means
from tests.recipes.dense import dense_attention, heads

pytestmark = pytest.mark.slow


def published(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what packages warn about while they are imported
        try:
            return importlib.import_module(name)
        except ImportError as error:
            pytest.skip(f"needs {name}: {error}")


def mask_of(block_mask):
    batch, query_heads, queries, keys = block_mask.shape
    index = [torch.arange(n).view([-1 if d == e else 1 for e in range(4)]) for d, n in enumerate(block_mask.shape)]
    return block_mask.mask_mod(*index).expand(batch, query_heads, queries, keys)


@pytest.mark.parametrize(("length", "top_k"), [(64, 3), (61, 2), (61, 9)])
def test_moba(length, top_k):
    naive = published("moba.moba_naive").moba_attn_varlen_naive
    query, key, value = (tensor.float() for tensor in heads(1, 2, 2, length, length))
    rows = [tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)]
    want = naive(*rows, torch.tensor([0, length]), length, moba_chunk_size=8, moba_topk=top_k)
    got = dense_attention(query, key, value, mask_of(moba_block_mask(query, key, chunk_size=8, top_k=top_k)))
    torch.testing.assert_close(got[0].transpose(0, 1), want, atol=1e-5, rtol=1e-5)


def test_nsa_with_one_size_of_block():
    naive = published("fla.ops.nsa.naive")
    query, key, value = (tensor.float() for tensor in heads(2, 32, 2, 96, 96))
    compressed = cell_means(key, 8)
    rows = [tensor.transpose(1, 2) for tensor in (query, key, value, compressed)]
    blocks = naive.naive_nsa_topk(rows[0], rows[3], 5, block_size=8, scale=8**-0.5)
    chosen = nsa_selection(
        query, compressed, num_keys=96, compressed_size=8, stride=8, selected_size=8, top_n=5, initial=1, local=2
    )
    assert torch.equal(chosen, (blocks.transpose(1, 2)[..., None] == torch.arange(12)).any(-2))
    want = naive.naive_nsa_selection(*rows[:3], blocks, block_size=8)
    mask = mask_of(nsa_block_mask(chosen, num_query_heads=32, num_keys=96, selected_size=8))
    torch.testing.assert_close(dense_attention(query, key, value, mask).transpose(1, 2), want, atol=1e-5, rtol=1e-5)


def test_seer_gate():
    gates = published("seer_attn.prefill_sparse.attn_gate").ATTNGATE_CLASSES
    query, key, _ = (tensor.float() for tensor in heads(2, 4, 2, 61, 61))
    ours = SeerGate(4, 2, 8, gate_size=6, block_size=8)
    theirs = gates["Qavg_Kmaxminavg"](8, 8, 6, num_k_head=2, num_q_head=4)
    theirs.mask_linear_q.weight, theirs.mask_linear_k.weight = ours.query_proj, ours.key_proj
    angle = (torch.arange(0, 61, 8)[:, None] * 10000.0 ** -(torch.arange(3) / 3)).repeat(1, 2)[None]
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    want = theirs(query.transpose(1, 2), key.transpose(1, 2), causal, (angle.cos(), angle.sin()), use_softmax=False)
    got = ours(query, key).masked_fill(~causal, -1e9)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
