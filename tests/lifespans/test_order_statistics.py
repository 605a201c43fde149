"""Both forms of kth_smallest compared with sorting, for every range of a permutation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdma.lifespans.order_statistics import kth_smallest_by_bit, kth_smallest_by_digit, scattered

WAYS = pytest.mark.parametrize("kth_smallest", [kth_smallest_by_bit, kth_smallest_by_digit])


@WAYS
def test_the_example_of_the_docstring(kth_smallest):
    values = torch.tensor([2, 0, 3, 1], dtype=torch.int32)
    left, right, k = torch.zeros(4, dtype=torch.int64), torch.full((4,), 4), torch.tensor([0, 1, 2, 3])
    assert kth_smallest(values, left, right, k).tolist() == [0, 1, 2, 3]


@WAYS
@given(st.integers(1, 70).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.randoms(use_true_random=False))))
def test_equals_sorting_the_range(kth_smallest, case):
    permutation, random = case
    n = len(permutation)
    ends = [sorted((random.randint(0, n), random.randint(0, n))) for _ in range(n)]
    ranges = [(min(left, n - 1), max(right, left + 1)) for left, right in ends]
    k = [random.randrange(right - left) for left, right in ((left, min(right, n)) for left, right in ranges)]
    left, right = (torch.tensor(side).clamp(max=n) for side in zip(*ranges, strict=True))
    got = kth_smallest(torch.tensor(permutation, dtype=torch.int32), left, right, torch.tensor(k)).tolist()
    assert got == [sorted(permutation[a:b])[i] for (a, b), i in zip(ranges, k, strict=True)]


def test_both_ways_agree_on_many_elements():
    n = 20_000
    values, left = torch.randperm(n, dtype=torch.int32)[None], torch.randint(0, n, (1, n))
    right = left + 1 + (torch.rand(1, n) * (n - left)).long()
    k = (torch.rand(1, n) * (right - left)).long()
    assert torch.equal(*(way(values, left, right, k) for way in (kth_smallest_by_bit, kth_smallest_by_digit)))


def test_scattering_is_the_inverse_of_gathering():
    values = torch.randperm(50, dtype=torch.int32).view(1, 50).repeat(3, 1)
    place = torch.rand(3, 50).argsort(-1)
    assert torch.equal(scattered(values, place).gather(-1, place), values)
