"""Rows of a group: position-major and head-major, and the blocks that heads repeat."""

from typing import Any

import pytest
import torch

from flexdma import causal_top_w
from flexdma.packing.rows import FoldedRows
from flexdma.packing.schedule import schedule


def test_by_head_where_no_block_spans_two_heads():
    assert FoldedRows.of(256, 4, 128, "cuda").by_head
    assert not FoldedRows.of(250, 4, 128, "cuda").by_head
    assert not FoldedRows.of(256, 1, 128, "cuda").by_head
    assert not FoldedRows.of(256, 4, 128, "cpu").by_head


@pytest.mark.parametrize("by_head", [False, True])
# Powers of two have a rule of their own.
@pytest.mark.parametrize(("queries", "group"), [(5, 3), (4, 3), (5, 2), (8, 4), (3, 1)])
def test_rows_are_the_heads_of_a_group_at_each_position(queries, group, by_head):
    rows, query = FoldedRows(queries, group, by_head), torch.randn(2, 2 * group, queries, 4)
    folded = rows.folded(query, 2)
    row = torch.arange(rows.total)
    position, head = rows.position(row), rows.head(row)
    for kv_head in range(2):
        torch.testing.assert_close(folded[:, kv_head], query[:, kv_head * group + head, position], rtol=0, atol=0)
    of_queries = torch.randn(2, 2, queries)
    assert torch.equal(rows.of_rows(of_queries), of_queries[..., position])
    torch.testing.assert_close(rows.unfolded(folded).transpose(2, 3).flatten(1, 2), query, rtol=0, atol=0)


def test_rows_by_head_are_a_view_of_contiguous_heads():
    query = torch.randn(2, 6, 5, 4)
    assert FoldedRows(5, 3, by_head=True).folded(query, 2).data_ptr() == query.data_ptr()


def as_masks(index, keys):
    """Whether each pair of a row block and a key block is partial, and full, by rows and by keys."""
    masks = []
    for each, width in ((index, keys), (index.transposed, index.partial_num.shape[-1])):
        for number, listed in ((each.partial_num, each.partial_indices), (each.full_num, each.full_indices)):
            mask = torch.zeros(*number.shape, width, dtype=torch.bool)
            for place in torch.cartesian_prod(*map(torch.arange, number.shape)).tolist():
                blocks = listed[tuple(place)][: number[tuple(place)]]
                assert blocks.tolist() == sorted(set(blocks.tolist()))
                mask[tuple(place)][blocks.long()] = True
            masks.append(mask)
    return masks


@pytest.mark.parametrize("length", [64, 256])  # one period, and several
def test_heads_that_see_the_same_blocks(length):
    alive = causal_top_w(torch.randn(2, 2, length), 9)
    sizes: dict[str, Any] = {"capacity": 9, "block_size": (16, 8), "transposed": True}
    packing, index = schedule(alive, rows=FoldedRows(length, group=1), **sizes)
    _, repeated = schedule(alive, rows=FoldedRows(length, group=3, by_head=True), **sizes)
    keys = packing.order.shape[-1] // 8
    partial, full, by_key, full_by_key = as_masks(index, keys)
    got = as_masks(repeated, keys)
    for one, want in zip(got, [partial.repeat(1, 1, 3, 1), full.repeat(1, 1, 3, 1)], strict=False):
        assert torch.equal(one, want)
    for one, want in zip(got[2:], [by_key.repeat(1, 1, 1, 3), full_by_key.repeat(1, 1, 1, 3)], strict=True):
        assert torch.equal(one, want)
