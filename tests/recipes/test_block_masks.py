"""Block masks: the mask_mod equals the dense mask, and the index agrees with it at block resolution."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import and_masks, create_mask, flex_attention, or_masks

from flexdma import Lifespans, causal_top_w
from flexdma.block_masks import (
    document_mask_mod,
    dynamic_block_mask,
    lifespan_block_mask,
    lifespan_mask_mod,
    sink_mask_mod,
    sliding_window_mask_mod,
)
from flexdma.packing.block_index import block_index
from flexdma.packing.rows import FoldedRows
from flexdma.packing.schedule import schedule
from flexdma.reference import dense_dynamic_mask_attention, dense_visibility
from flexdma.score_mods import alibi_score_mod, gate_score_mod, softcap_score_mod
from tests.comparison import inputs
from tests.lifespans.gate_strategies import gates, selections

cases = gates().flatmap(lambda gate: st.tuples(st.just(gate), st.integers(1, 12), selections(gate.shape[-1])))


def blocks_of(mask, rows, columns):
    """(any, all) per block of [..., Q, K]; rows beyond Q are ignored, and keys beyond K are masked."""
    q, k = mask.shape[-2:]
    pad_q, pad_k = -q % rows, -k % columns
    any_mask = torch.nn.functional.pad(mask, (0, pad_k, 0, pad_q), value=False)
    all_mask = torch.nn.functional.pad(torch.nn.functional.pad(mask, (0, pad_k)), (0, 0, 0, pad_q), value=True)
    tiles = [t.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)) for t in (any_mask, all_mask)]
    return tiles[0].any(-1).any(-2), tiles[1].all(-1).all(-2)


def listed(number, indices, width):
    """[..., R, width] bool from numbers and indices, which are sorted, unique and in range."""
    chosen = torch.arange(indices.shape[-1]) < number[..., None]
    assert number.dtype == indices.dtype == torch.int32
    assert indices.is_contiguous()
    assert ((indices >= 0) & (indices < width)).all()
    assert (torch.diff(indices, dim=-1) > 0)[chosen[..., 1:]].all()
    marks = torch.zeros(*indices.shape[:-1], width + 1, dtype=torch.bool)
    return marks.scatter(-1, torch.where(chosen, indices, width).long(), True)[..., :width]


def check_index(index, dense, rows, columns):
    """Compare the index with its mask [..., rows of queries, keys]."""
    some, every = blocks_of(dense, rows, columns)
    row_blocks, key_blocks = some.shape[-2:]
    partial = listed(index.partial_num, index.partial_indices, key_blocks)
    full = listed(index.full_num, index.full_indices, key_blocks)
    partial_transposed = listed(index.transposed.partial_num, index.transposed.partial_indices, row_blocks)
    full_transposed = listed(index.transposed.full_num, index.transposed.full_indices, row_blocks)
    assert torch.equal(partial | full, some)
    assert torch.equal(full, every & some)
    assert not (partial & full).any()
    assert torch.equal(partial_transposed, partial.mT)
    assert torch.equal(full_transposed, full.mT)


@given(cases, st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.data())
def test_index_equal_the_dense_mask_in_any_order_of_keys(case, group, rows, columns, data):
    gate, window, options = case
    length = gate.shape[-1]
    queries = data.draw(st.integers(1, length))
    order = torch.tensor(data.draw(st.permutations(range(length))))
    birth, death = (bound[..., order] - (length - queries) for bound in causal_top_w(gate, window, **options))
    folded = FoldedRows(queries, group)
    index = block_index(birth, death, rows=folded, block_size=(rows, columns), transposed=True)
    dense = dense_visibility(gate, window_size=window, **options)[..., length - queries :, order]
    check_index(index, dense.repeat_interleave(group, -2), rows, columns)
    for indices in index.tensors()[1::2]:
        assert torch.equal(indices.sort(-1).values, torch.arange(indices.shape[-1]).expand_as(indices))


@given(cases, st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.data())
def test_index_of_packed_keys_equal_the_dense_mask(case, group, rows, columns, data):
    gate, window, options = case
    length = gate.shape[-1]
    queries = data.draw(st.integers(1, length))
    lifespans = causal_top_w(gate, window, **options)
    capacity = window + options.get("sinks", 0) + options.get("recent", 0)
    sizes = {"capacity": capacity, "block_size": (rows, columns)}
    packing, index = schedule(lifespans, rows=FoldedRows(queries, group), **sizes, transposed=True)
    query = torch.arange(queries)[:, None]
    dense = (packing.birth.unsqueeze(-2) <= query) & (query < packing.death.unsqueeze(-2))
    check_index(index, dense.repeat_interleave(group, -2), rows, columns)


@given(cases)
def test_the_mask_mod_alone_is_the_whole_truth(case):
    gate, window, options = case
    length = gate.shape[-1]
    lifespans = causal_top_w(gate, window, **options)
    mask = create_mask(
        lifespan_mask_mod(lifespans, num_query_heads=gate.shape[1]), 1, gate.shape[1], length, length, device="cpu"
    )
    assert torch.equal(mask, dense_visibility(gate, window_size=window, **options))


def test_block_mask_of_grouped_heads_and_fewer_queries():
    gate = torch.randn(2, 2, 70)
    lifespans = causal_top_w(gate, 9)
    block_mask = lifespan_block_mask(lifespans, num_query_heads=6, num_queries=33, block_size=(16, 8))
    assert block_mask.shape == (2, 6, 33, 70)
    dense = dense_visibility(gate, window_size=9)[..., 37:, :].repeat_interleave(3, 1)
    assert torch.equal(create_mask(block_mask.mask_mod, 2, 6, 33, 70, device="cpu"), dense)
    some, _ = blocks_of(dense, 16, 8)
    assert torch.equal(block_mask.to_dense().bool(), some)
    for tensor in block_mask.as_tuple():
        assert not isinstance(tensor, torch.Tensor) or tensor.is_contiguous()


def test_recipes_say_what_they_are_named():
    ids = torch.tensor([[0, 0, 0, 1, 1, 1]])
    window_or_sink = or_masks(sliding_window_mask_mod(2), sink_mask_mod(1))
    mask = create_mask(and_masks(window_or_sink, document_mask_mod(ids)), 1, 1, 6, 6, device="cpu")
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_recipes_in_plain_flex_attention_equal_the_operator():
    tensors = inputs(1, 4, 2, 300, 300, 16, dtype=torch.float32)
    query, key, value, gate = tensors
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4])
    alibi, softcap, gated = alibi_score_mod(slopes), softcap_score_mod(5.0), gate_score_mod(gate, num_query_heads=4)

    def user(score, b, h, q_idx, kv_idx):
        return softcap(alibi(score, b, h, q_idx, kv_idx), b, h, q_idx, kv_idx)

    def composed(score, b, h, q_idx, kv_idx):
        return gated(user(score, b, h, q_idx, kv_idx), b, h, q_idx, kv_idx)

    with torch.no_grad():
        block_mask = dynamic_block_mask(gate, 50, num_query_heads=4)
        want = dense_dynamic_mask_attention(*tensors, window_size=50, score_mod=user)
        compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        for attend in (flex_attention, compiled):
            got = attend(query, key, value, score_mod=composed, block_mask=block_mask, enable_gqa=True)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_index_memory_is_linear_plus_four_ints_per_block_pair():
    keys = 4096
    lifespans = causal_top_w(torch.randn(1, 2, keys), 128)
    block_mask = lifespan_block_mask(lifespans, num_query_heads=2, block_size=128)
    held = sum(t.numel() for t in block_mask.as_tuple() if isinstance(t, torch.Tensor))
    pairs = 2 * (keys // 128) ** 2
    assert held <= 4 * pairs + 8 * keys


def test_wrong_arguments_are_named():
    lifespans = causal_top_w(torch.randn(1, 2, 8), 3)
    with pytest.raises(ValueError, match="num_query_heads: expected a multiple of lifespans's 2 heads, got 3"):
        lifespan_block_mask(lifespans, num_query_heads=3)
    with pytest.raises(ValueError, match="num_queries: expected at most K = 8, got 9"):
        lifespan_block_mask(lifespans, num_query_heads=2, num_queries=9)
    with pytest.raises(ValueError, match=r"lifespans\.death: expected \[1, 2, 8\], got \[1, 1, 8\]"):
        lifespan_block_mask(Lifespans(lifespans.birth, lifespans.death[:, :1]), num_query_heads=2)
    with pytest.raises(ValueError, match="cap: expected a number above 0, got 0"):
        softcap_score_mod(0)
    with pytest.raises(ValueError, match="window_size: expected at least 1, got 0"):
        sliding_window_mask_mod(0)
    with pytest.raises(ValueError, match="num_sinks: expected at least 1, got 0"):
        sink_mask_mod(0)
    with pytest.raises(ValueError, match=r"gate: expected \[B, H, K\], got \[3\]"):
        gate_score_mod(torch.zeros(3), num_query_heads=1)
    with pytest.raises(ValueError, match="num_query_heads: expected a multiple of gate's 2 heads, got 3"):
        gate_score_mod(torch.zeros(1, 2, 3), num_query_heads=3)


@pytest.mark.parametrize("recipe", [gate_score_mod, lifespan_mask_mod])
def test_grouped_heads_cannot_be_forgotten(recipe):
    """FlexAttention does not pass the number of heads, and a compiled recipe with a wrong one reads beyond its tensor."""
    with pytest.raises(TypeError, match="num_query_heads"):
        recipe(torch.zeros(1, 2, 8) if recipe is gate_score_mod else causal_top_w(torch.zeros(1, 2, 8), 3))
