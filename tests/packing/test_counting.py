"""Sorted rows, as graphs for a GPU compute them, compared with ATen's sort of several rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdma.packing import counting


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    monkeypatch.setattr(counting, "is_fused", lambda tensor: True)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.sampled_from([7, 2**31]))
def test_rows_are_sorted_each_and_stably(numbers, end):
    """With an end of 2^31 the rows' keys would leave int32."""
    rows = torch.tensor([[numbers, numbers[::-1]], [sorted(numbers), [0] * len(numbers)]], dtype=torch.int32)
    ascending, order = rows.sort(dim=-1, stable=True)
    assert all(map(torch.equal, counting.sorted_rows(rows, end), (ascending, order)))
