"""HAX's hash buckets, against a loop over queries that walks back through the keys of its bucket."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from flexdma import lifespan_attention
from flexdma.block_masks import hax_block_mask, hax_buckets
from tests.recipes.dense import check_attention, check_mask, dense_attention, heads, uncompiled


def dense_buckets(query_buckets, key_buckets, window_size):
    """The mask over positions."""
    batch, query_heads, queries = query_buckets.shape
    keys = key_buckets.shape[2]
    mask = torch.zeros(batch, query_heads, queries, keys, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, query_buckets.shape)).tolist():
        seen = 0
        for j in range(keys - queries + i, -1, -1):
            if key_buckets[b, h * key_buckets.shape[1] // query_heads, j] == query_buckets[b, h, i]:
                mask[b, h, i, j] = window_size is None or seen < window_size
                seen += 1
    return mask


def sorted_mask(dense, orders):
    rows = dense.take_along_dim(orders.query_order[..., None], 2)
    return rows.take_along_dim(
        orders.key_order.repeat_interleave(dense.shape[1] // orders.key_order.shape[1], 1)[:, :, None], 3
    )


@settings(max_examples=15)
@given(st.data())
def test_buckets(data):
    keys = data.draw(st.integers(1, 14))
    queries = data.draw(st.integers(1, keys))
    kv_heads = data.draw(st.integers(1, 2))
    buckets = st.integers(0, data.draw(st.integers(0, 4)))
    query_buckets = torch.tensor(data.draw(st.lists(buckets, min_size=4 * queries, max_size=4 * queries))).view(
        2, 2, queries
    )
    key_buckets = torch.tensor(data.draw(st.lists(buckets, min_size=2 * kv_heads * keys, max_size=2 * kv_heads * keys)))
    key_buckets = key_buckets.view(2, kv_heads, keys)
    key_buckets[:, :, ::5] = -1  # padding
    window_size = data.draw(st.none() | st.integers(1, 5))
    mask = hax_block_mask(query_buckets, key_buckets, window_size=window_size, block_size=(3, 2))
    check_mask(mask.block_mask, sorted_mask(dense_buckets(query_buckets, key_buckets, window_size), mask))


def buckets_of(query, key):
    directions = torch.randn(8, 3, dtype=torch.float64)
    return hax_buckets(query, directions), hax_buckets(key, directions)


@uncompiled
def test_attention_of_sorted_queries_and_keys():
    query, key, value = heads(2, 4, 2, 20, 29)
    query_buckets, key_buckets = buckets_of(query, key)
    mask = hax_block_mask(query_buckets, key_buckets, window_size=4, block_size=(8, 4))
    dense = dense_buckets(query_buckets, key_buckets, 4)
    rows = query.take_along_dim(mask.query_order[..., None], 2)
    keys, values = (tensor.take_along_dim(mask.key_order[..., None], 2) for tensor in (key, value))
    check_attention(mask.block_mask, sorted_mask(dense, mask), rows, keys, values)
    back = mask.query_order.argsort(-1)[..., None]
    output = dense_attention(rows, keys, values, sorted_mask(dense, mask)).take_along_dim(back, 2)
    torch.testing.assert_close(output, dense_attention(query, key, value, dense))


def test_sorted_buckets_are_lifespans():
    """So the operator packs them."""
    query, key, value = heads(2, 4, 4, 29, 29)
    query_buckets, key_buckets = buckets_of(query, key)
    mask = hax_block_mask(query_buckets, key_buckets, window_size=4)
    rows = query.take_along_dim(mask.query_order[..., None], 2)
    keys, values = (tensor.take_along_dim(mask.key_order[..., None], 2) for tensor in (key, value))
    got = lifespan_attention(rows, keys, values, mask.lifespans, lowering="gather")
    want = dense_attention(query, key, value, dense_buckets(query_buckets, key_buckets, 4))
    torch.testing.assert_close(got.take_along_dim(mask.query_order.argsort(-1)[..., None], 2), want)


@pytest.mark.slow
def test_a_compiled_call_sorts_masks_and_attends():
    query, key, value = (tensor.float() for tensor in heads(1, 4, 2, 128, 128, 16))
    directions = torch.randn(16, 5)

    def attend(query, key, value):
        mask = hax_block_mask(
            hax_buckets(query, directions), hax_buckets(key, directions), window_size=9, block_size=32
        )
        rows = query.take_along_dim(mask.query_order[..., None], 2)
        keys, values = (tensor.take_along_dim(mask.key_order[..., None], 2) for tensor in (key, value))
        output = flex_attention(rows, keys, values, block_mask=mask.block_mask, enable_gqa=True)
        return output.take_along_dim(mask.query_order.argsort(-1)[..., None], 2)

    with torch.no_grad():
        dense = dense_buckets(hax_buckets(query, directions), hax_buckets(key, directions), 9)
        got = torch.compile(attend, fullgraph=True, dynamic=False)(query, key, value)
        torch.testing.assert_close(got, dense_attention(query, key, value, dense), atol=1e-5, rtol=0)


def test_the_drawn_case():
    buckets = torch.tensor([[[0, 1, 0, 0, 1]]])
    mask = hax_block_mask(buckets, buckets, window_size=2)
    assert mask.query_order.tolist() == mask.key_order.tolist() == [[[0, 2, 3, 1, 4]]]
    assert mask.lifespans.birth.tolist() == [[[0, 1, 2, 3, 4]]]
    assert mask.lifespans.death.tolist() == [[[2, 3, 3, 5, 5]]]


def test_wrong_arguments_are_named():
    buckets = torch.zeros(1, 2, 5, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"key_buckets: expected torch\.int32 or torch\.int64, got torch\.float32"):
        hax_block_mask(buckets, buckets.float())
    with pytest.raises(ValueError, match="query_buckets: expected at most K = 3 queries"):
        hax_block_mask(buckets, buckets[..., :3])
    with pytest.raises(ValueError, match="window_size: expected at least 1, got 0"):
        hax_block_mask(buckets, buckets, window_size=0)
    with pytest.raises(ValueError, match=r"directions: expected \[8, buckets\], got \[4, 3\]"):
        hax_buckets(torch.zeros(1, 1, 2, 8), torch.zeros(4, 3))
