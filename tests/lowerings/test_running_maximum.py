"""The largest number up to each position by blocks, as graphs for a GPU compute it, compared with ATen's scan."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdma.lowerings import running_maximum as module


@pytest.fixture(autouse=True)
def by_blocks(monkeypatch):
    monkeypatch.setattr(module, "is_fused", lambda tensor: True)
    monkeypatch.setattr(module, "BLOCK", 4)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.sampled_from([torch.int32, torch.int64]))
def test_ties_and_all_lengths(numbers, dtype):
    rows = torch.tensor([numbers, numbers[::-1]], dtype=dtype)[None]
    largest, best = rows.cummax(-1)
    assert torch.equal(module.running_maximum(rows), largest)
    assert all(map(torch.equal, module.running_best(rows), (largest, best)))
    assert torch.equal(module.running_maximum(rows.float().exp()), rows.float().exp().cummax(-1).values)


def test_the_smallest_numbers():
    rows = torch.full((1, 1, 9), torch.iinfo(torch.int64).min)
    largest, best = module.running_best(rows)
    assert torch.equal(largest, rows)
    assert best.flatten().tolist() == list(range(9))
