"""flash_mask_lifespans equals the dense mask that Paddle's documentation describes, and its own masks of families."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdma.policies import flash_mask_lifespans
from tests.policies.slow_masks import union

FORMS = [(True, 1), (True, 2), (False, 2), (False, 4)]


def masked(row, position, bounds, causal):
    """Whether a row is masked in the column of the key at this row position."""
    if causal and row < position:
        return True
    if len(bounds) == 1:
        return row >= bounds[0]
    if causal:
        return bounds[0] <= row < bounds[1]
    if len(bounds) == 2:
        return row >= bounds[0] or row < bounds[1]
    return bounds[0] <= row < bounds[1] or bounds[2] <= row < bounds[3]


@given(st.sampled_from(FORMS), st.integers(1, 8), st.integers(0, 4), st.integers(1, 2), st.data())
def test_paddle_masks_these_rows(form, queries, more, heads, data):
    causal, columns = form
    keys = queries + more
    flat = data.draw(
        st.lists(st.integers(-2, queries + 2), min_size=heads * keys * columns, max_size=heads * keys * columns)
    )
    indices = torch.tensor(flat).view(1, heads, keys, columns)
    lifespans = flash_mask_lifespans(indices, causal=causal, num_queries=queries if more else None)
    assert len(lifespans) == {1: 1, 2: 1 + causal, 4: 3}[columns]
    got = union(lifespans)
    assert not got[:, :, :more].any()
    for head in range(heads):
        want = [
            [not masked(row, j - more, indices[0, head, j].tolist(), causal) for j in range(keys)]
            for row in range(queries)
        ]
        assert got[0, head, more:].tolist() == want
    assert torch.equal(union(flash_mask_lifespans(indices.int(), causal=causal, num_queries=queries)), got)


def test_the_figures_of_paddles_documentation():
    """Of ten keys: causal documents (b), bidirectional documents (f), and three tokens that see and are seen by all (g)."""
    i, j = torch.arange(10)[:, None], torch.arange(10)
    document = torch.tensor([0] * 4 + [1] * 3 + [2] * 3)
    together = document[:, None] == document
    ends, starts = torch.tensor([4, 7, 10])[document], torch.tensor([0, 4, 7])[document]
    causal_documents = flash_mask_lifespans(ends.view(1, 1, 10, 1), causal=True)
    assert torch.equal(union(causal_documents)[0, 0], together & (j <= i))
    documents = flash_mask_lifespans(torch.stack([ends, starts], -1)[None, None], causal=False)
    assert torch.equal(union(documents)[0, 0], together)
    figure_g = [*[[10, 10, 0, 0]] * 3, [3, 10, 0, 0], [4, 10, 3, 4], *[[m, 10, 3, m] for m in range(5, 10)]]
    window = union(flash_mask_lifespans(torch.tensor([[figure_g]]), causal=False))[0, 0]
    assert torch.equal(window, (i < 3) | (j < 3))


def test_a_window_with_sinks_keeps_births_at_positions():
    """Causal with one column: keys are born at their own positions, which is `in_order`."""
    indices = (torch.arange(12) + 4).clamp(max=12)
    indices[:2] = 12
    (lifespans,) = flash_mask_lifespans(indices.view(1, 1, 12, 1), causal=True)
    assert lifespans.birth[0, 0].tolist() == list(range(12))
    assert lifespans.death[0, 0].tolist() == [12, 12, *(min(j + 4, 12) for j in range(2, 12))]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"startend_row_indices": torch.zeros(1, 2, 3)},
            ValueError,
            r"startend_row_indices: expected \[B, H, K, 1, 2 or 4\]",
        ),
        ({"startend_row_indices": torch.zeros(1, 2, 3, 1)}, TypeError, "startend_row_indices: expected torch.int32 or"),
        ({"causal": False}, ValueError, "expected 2 or 4 columns with causal=False, got 1"),
        ({"causal": 1}, TypeError, "causal: expected a bool, got int"),
        ({"num_queries": 4}, ValueError, "num_queries: expected at most K = 3, got 4"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    right = {"startend_row_indices": torch.zeros(1, 2, 3, 1, dtype=torch.int32), "causal": True}
    with pytest.raises(error, match=message):
        flash_mask_lifespans(**{**right, **arguments})
