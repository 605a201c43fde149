"""kth_smallest against sorting, for every range of a permutation."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdma.order_statistics import kth_smallest


def test_the_example_of_the_docstring():
    values = torch.tensor([2, 0, 3, 1])
    left, right, k = torch.zeros(4, dtype=torch.int64), torch.full((4,), 4), torch.tensor([0, 1, 2, 3])
    assert kth_smallest(values, left, right, k).tolist() == [0, 1, 2, 3]


@given(st.integers(1, 70).flatmap(lambda n: st.tuples(st.permutations(range(n)), st.randoms(use_true_random=False))))
def test_equals_sorting_the_range(case):
    permutation, random = case
    n = len(permutation)
    ranges = [sorted((random.randint(0, n), random.randint(0, n))) for _ in range(n)]
    ranges = [(min(left, n - 1), max(right, left + 1)) for left, right in ranges]
    k = [random.randrange(right - left) for left, right in ((left, min(right, n)) for left, right in ranges)]
    left, right = (torch.tensor(side).clamp(max=n) for side in zip(*ranges, strict=True))
    got = kth_smallest(torch.tensor(permutation), left, right, torch.tensor(k)).tolist()
    assert got == [sorted(permutation[a:b])[i] for (a, b), i in zip(ranges, k, strict=True)]
