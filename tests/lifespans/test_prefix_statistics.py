"""kth_smallest_of_prefix compared with sorting, and with kth_smallest, which other devices use."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdma.lifespans.order_statistics import kth_smallest
from flexdma.lifespans.prefix_statistics import kth_smallest_of_prefix
from flexdma.lifespans.ranking import by_rank


@given(st.integers(1, 70).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.randoms(use_true_random=False))))
def test_equals_sorting_the_prefix(case):
    permutation, random = case
    right = [random.randint(1, len(permutation)) for _ in permutation]
    k = [random.randrange(count) for count in right]
    got = kth_smallest_of_prefix(torch.tensor(permutation), torch.tensor(right), torch.tensor(k)).tolist()
    assert got == [sorted(permutation[:n])[i] for n, i in zip(right, k, strict=True)]


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 5000])
def test_many_rows_and_questions_without_an_answer(length):
    values = torch.stack([torch.randperm(length) for _ in range(6)]).view(2, 3, length)
    right, k = torch.arange(length).expand_as(values), torch.randint(0, length + 1, values.shape)
    got = kth_smallest_of_prefix(values, right, k)
    want = kth_smallest(values.int(), torch.zeros_like(values), right.contiguous(), k)
    assert torch.equal(got[k < right], want[k < right].int())


@pytest.mark.parametrize("window", [1, 7, 40])
def test_counting_earlier_documents_in_is_leaving_them_out(window):
    """Their keys come first in rank and in position, so both questions have the same result."""
    gate = torch.randn(2, 3, 200).mul(4).round()
    ids = torch.tensor([[0] * 90 + [1] * 3 + [2] * 107, [0] * 10 + [1] * 190])
    start = (ids[:, None] == ids[:, :, None]).int().argmax(-1)[:, None]  # of the key's document
    ranked = by_rank(gate, start)
    rank = ranked.argsort(-1)
    got = kth_smallest_of_prefix(ranked, rank, (start + window - 1).expand_as(rank))
    left, k = start.expand_as(rank).contiguous(), torch.full_like(rank, window - 1)
    want = kth_smallest(ranked.int(), left, rank, k)
    evicted = rank - start >= window
    assert evicted.any()
    assert torch.equal(got[evicted], want[evicted].int())
