"""Routing between cells, and MoBA, NSA's selection and BiFormer, each against the sentence of its paper written as loops."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from flexdma.block_masks import (
    biformer_block_mask,
    biformer_order,
    moba_block_mask,
    nsa_block_mask,
    nsa_selection,
    routed_block_mask,
)
from tests.recipes.dense import check_attention, check_mask, dense_attention, heads, uncompiled


def dense_routing(chosen, lengths, cells, causal, real=None):
    queries, keys = lengths
    mask = chosen.repeat_interleave(cells[0], 2)[:, :, :queries].repeat_interleave(cells[1], 3)[..., :keys]
    if causal:
        mask = mask & (torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None])
    return mask if real is None else mask & real[:, None, None]


@settings(max_examples=15)
@given(st.data())
def test_routing_of_any_cells_in_blocks_of_any_size(data):
    keys = data.draw(st.integers(1, 23))
    causal = data.draw(st.booleans())
    queries = data.draw(st.integers(1, keys if causal else 23))
    cells = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    block_size = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    counts = [-(-length // cell) for length, cell in zip((queries, keys), cells, strict=True)]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    chosen = torch.rand(2, 2, *counts, generator=generator) < data.draw(st.sampled_from([0.2, 0.8]))
    real = torch.rand(2, keys, generator=generator) < 0.8 if data.draw(st.booleans()) else None
    options: dict[str, Any] = {"lengths": (queries, keys), "cells": cells, "causal": causal}
    block_mask = routed_block_mask(chosen, num_query_heads=4, block_size=block_size, key_padding_mask=real, **options)
    dense = dense_routing(chosen, real=real, **options).repeat_interleave(2, 1)
    # Blocks that cut a cell on the diagonal, or at a padded key, may be listed without a visible pair.
    check_mask(block_mask, dense, exact=not causal and real is None)


def test_blocks_of_whole_cells_are_listed_exactly():
    chosen = torch.rand(1, 2, 5, 5) < 0.4
    for block_size in (4, 8):
        options: dict[str, Any] = {"lengths": (18, 18), "cells": (4, 4), "causal": True}
        chosen = chosen & torch.ones(5, 5, dtype=torch.bool).tril()
        block_mask = routed_block_mask(chosen, num_query_heads=2, block_size=block_size, **options)
        check_mask(block_mask, dense_routing(chosen, **options))


def dense_moba(query, key, chunk_size, top_k, real):
    batch, query_heads, queries, _ = query.shape
    keys = key.shape[2]
    mask = torch.zeros(batch, query_heads, queries, keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(query_heads):
            for i in range(queries):
                position = keys - queries + i
                own = position // chunk_size
                scores = {}
                for chunk in range(own):
                    members = [j for j in range(chunk * chunk_size, (chunk + 1) * chunk_size) if real[b, j]]
                    if members:
                        mean = sum(key[b, h * key.shape[1] // query_heads, j] for j in members) / len(members)
                        scores[chunk] = (query[b, h, i] @ mean).item()
                best = sorted(scores, key=scores.__getitem__)[len(scores) - min(len(scores), top_k - 1) :]
                for j in range(position + 1):
                    mask[b, h, i, j] = real[b, j] and (j // chunk_size == own or j // chunk_size in best)
    return mask


@uncompiled
@pytest.mark.parametrize(("queries", "padded"), [(21, 0), (21, 3), (10, 0)])
def test_moba(queries, padded):
    query, key, value = heads(2, 4, 2, queries, 21)
    real = torch.arange(21) < torch.tensor([[21], [21 - padded]])
    dense = dense_moba(query, key, 4, 3, real)
    block_mask = moba_block_mask(
        query, key, chunk_size=4, top_k=3, block_size=(8, 4), key_padding_mask=real if padded else None
    )
    check_mask(block_mask, dense)
    if queries < 21:
        check_attention(block_mask, dense, query, key, value)


def test_moba_ignores_what_padded_keys_hold():
    query, key, _ = heads(1, 2, 2, 21, 21)
    real = (torch.arange(21) < 18)[None]
    masks = []
    for filler in (0.0, float("nan")):
        padded = torch.where(real[:, None, :, None], key, filler)
        masks.append(moba_block_mask(query, padded, chunk_size=4, top_k=3, key_padding_mask=real))
    dense = dense_moba(query, key, 4, 3, real)
    for block_mask in masks:
        check_mask(block_mask, dense)


def dense_nsa(query, compressed, num_keys, compressed_size, stride, selected_size, top_n, initial, local):
    batch, query_heads, queries, size = query.shape
    group = query_heads // compressed.shape[1]
    blocks = -(-num_keys // selected_size)
    chosen = torch.zeros(batch, compressed.shape[1], queries, blocks, dtype=torch.bool)
    for b in range(batch):
        for kv in range(compressed.shape[1]):
            for i in range(queries):
                position = num_keys - queries + i
                own = position // selected_size
                importance = [0.0] * blocks
                seen = [c for c in range(compressed.shape[2]) if c * stride + compressed_size - 1 <= position]
                for h in range(kv * group, (kv + 1) * group):
                    if not seen:
                        continue
                    weights = torch.stack([query[b, h, i] @ compressed[b, kv, c] * size**-0.5 for c in seen]).softmax(0)
                    for c, weight in zip(seen, weights.tolist(), strict=True):
                        for u in range(c, c + compressed_size // stride):  # the strides of summary c
                            importance[u * stride // selected_size] += weight
                fixed = {x for x in range(own + 1) if x < initial or own - x < local}
                others = sorted((x for x in range(own + 1) if x not in fixed), key=lambda x: (importance[x], x))
                for x in [*fixed, *others[max(0, len(others) - (top_n - len(fixed))) :]]:
                    chosen[b, kv, i, x] = True
    return chosen


@uncompiled
@pytest.mark.parametrize(("queries", "keys"), [(26, 26), (9, 26), (3, 3)])
def test_nsa_selection(queries, keys):
    query, key, value = heads(1, 4, 2, queries, keys)
    summaries = max(0, (keys - 4) // 2 + 1)
    compressed = torch.randn(1, 2, summaries, 8, dtype=torch.float64)
    options = {"compressed_size": 4, "stride": 2, "selected_size": 4, "top_n": 4, "initial": 1, "local": 2}
    want = dense_nsa(query, compressed, keys, **options)
    chosen = nsa_selection(query, compressed, num_keys=keys, **options)
    assert torch.equal(chosen, want)
    block_mask = nsa_block_mask(chosen, num_query_heads=4, num_keys=keys, selected_size=4, block_size=(8, 4))
    dense = dense_routing(want, (queries, keys), (1, 4), True).repeat_interleave(2, 1)
    check_mask(block_mask, dense)
    if queries < keys:
        check_attention(block_mask, dense, query, key, value)


def test_a_block_of_rows_visits_the_union_of_its_choices():
    """Why NSA's selection is for reference here: 16 blocks a query, many more for 128 rows."""
    query = torch.randn(1, 1, 2048, 16)
    compressed = torch.randn(1, 1, 127, 16)
    chosen = nsa_selection(query, compressed, num_keys=2048, compressed_size=32, stride=16, selected_size=16, top_n=16)
    assert chosen[:, :, 1024:].sum(-1).unique().tolist() == [16]
    block_mask = nsa_block_mask(chosen, num_query_heads=1, num_keys=2048, selected_size=16, block_size=(128, 16))
    visited = (block_mask.kv_num_blocks + block_mask.full_kv_num_blocks)[0, 0, 8:]  # type: ignore[operator]
    assert visited.min() > 4 * 16


def dense_biformer(query, key, grid, regions, top_k):
    """The mask over tokens in raster order."""
    (height, width), (down, across) = grid, regions
    region = [
        (p // width) // (height // down) * across + (p % width) // (width // across) for p in range(height * width)
    ]
    members = [[p for p, r in enumerate(region) if r == x] for x in range(down * across)]
    mask = torch.zeros(query.shape[0], query.shape[1], height * width, height * width, dtype=torch.bool)
    group = query.shape[1] // key.shape[1]
    for b in range(query.shape[0]):
        for rows in members:
            scores = [
                sum(
                    query[b, h, rows].mean(0) @ key[b, h // group, columns].mean(0) for h in range(query.shape[1])
                ).item()
                for columns in members
            ]
            for y in sorted(range(len(members)), key=scores.__getitem__)[-top_k:]:
                for p in rows:
                    mask[b, :, p, members[y]] = True
    return mask


@uncompiled
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_biformer(kv_heads):
    grid, regions = (6, 4), (3, 2)
    query, key, value = heads(2, 4, kv_heads, 24, 24)
    order = biformer_order(grid, regions)
    dense = dense_biformer(query, key, grid, regions, 2)[..., order, :][..., order]
    query, key, value = (tensor[:, :, order] for tensor in (query, key, value))
    for block_size in (4, 8, 5):
        block_mask = biformer_block_mask(query, key, num_regions=6, top_k=2, block_size=block_size)
        check_mask(block_mask, dense)
    if kv_heads < 4:
        check_attention(block_mask, dense, query, key, value)


def test_biformer_order_makes_regions_neighbours():
    assert biformer_order((2, 4), (1, 2)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    with pytest.raises(ValueError, match=r"grid: expected multiples of regions = \(2, 2\), got \(3, 4\)"):
        biformer_order((3, 4), (2, 2))


@pytest.mark.slow
def test_a_compiled_call_makes_the_mask_and_skips_what_it_skips():
    query, key, value = (tensor.float() for tensor in heads(1, 4, 2, 300, 300, 16))

    def attend(query, key, value):
        block_mask = moba_block_mask(query, key, chunk_size=64, top_k=2, block_size=(128, 32))
        return flex_attention(query, key, value, block_mask=block_mask, enable_gqa=True)

    dense = dense_moba(query, key, 64, 2, torch.ones(1, 300, dtype=torch.bool))
    with torch.no_grad():
        got = torch.compile(attend, fullgraph=True, dynamic=False)(query, key, value)
        torch.testing.assert_close(got, dense_attention(query, key, value, dense), atol=1e-5, rtol=0)


def test_wrong_arguments_are_named():
    query, key, _ = heads(1, 2, 1, 8, 8)
    chosen = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    options: dict[str, Any] = {"num_query_heads": 2, "cells": (4, 4)}
    with pytest.raises(ValueError, match=r"chosen: expected \[B, H, 3, 3\], got \[1, 1, 2, 2\]"):
        routed_block_mask(chosen, lengths=(9, 9), **options)
    with pytest.raises(TypeError, match=r"chosen: expected torch\.bool, got torch\.int64"):
        routed_block_mask(chosen.long(), lengths=(8, 8), **options)
    with pytest.raises(ValueError, match="lengths: expected Q of at most K = 5 with causal=True, got 8"):
        routed_block_mask(chosen, lengths=(8, 5), **options)
    with pytest.raises(ValueError, match="top_k: expected at least 1, got 0"):
        moba_block_mask(query, key, chunk_size=4, top_k=0)
    with pytest.raises(ValueError, match=r"key_padding_mask: expected \[1, 8\], got \[1, 7\]"):
        moba_block_mask(query, key, chunk_size=4, top_k=1, key_padding_mask=torch.ones(1, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="top_n: expected at least initial"):
        nsa_selection(query, key[:, :, :1], num_keys=8, compressed_size=8, stride=8, selected_size=8, top_n=2)
    with pytest.raises(ValueError, match="selected_size: expected a multiple of stride = 16, got 24"):
        nsa_selection(query, key, num_keys=8, selected_size=24)
    with pytest.raises(ValueError, match=r"compressed_key: expected \[1, Hkv, 0, 8\], got \[1, 1, 8, 8\]"):
        nsa_selection(query, key, num_keys=8)
    with pytest.raises(ValueError, match="num_regions: expected a divisor of 8 tokens, got 3"):
        biformer_block_mask(query, key, num_regions=3, top_k=1)
    with pytest.raises(ValueError, match="key: expected 4 tokens as query has, got 8"):
        biformer_block_mask(query[:, :, :4], key, num_regions=2, top_k=1)
