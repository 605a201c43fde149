"""Policies over one number per key, or none, equal the sentence of their paper, in Python loops."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdma import policies
from tests.policies.slow_masks import Row, numbers, rank, union

SPECIAL = [-math.inf, math.inf, math.nan, 0.0, 1.0, -1.0]
SCORES = st.one_of(st.sampled_from(SPECIAL), st.floats(width=32))
LOGARITHMS = st.one_of(st.sampled_from([0.0, -0.5, -1.0, -math.inf, math.nan]), st.floats(max_value=0.0, width=32))
WINDOWS = st.one_of(st.integers(1, 6), st.lists(st.integers(1, 6), min_size=2, max_size=2))


def per_head(size, heads):
    """What the function gets, and the size of each head."""
    size = size if isinstance(size, int) or heads == 2 else size[0]
    return size, [size] * heads if isinstance(size, int) else size


def same(lifespans, rows_of_heads):
    assert union(lifespans)[0].tolist() == rows_of_heads


@given(numbers(SCORES), WINDOWS)
def test_dms_a_marked_key_leaves_after_the_window(case, window):
    """A key with alpha > 0 is evicted `window` steps after its own."""
    (alpha, options), (size, of_head) = case, per_head(window, case[0].shape[1])
    row = Row(alpha.shape[-1], **options)
    want = [
        row.mask(lambda i, j, a=a, w=w: i - j < w or not a[j] > 0)
        for a, w in zip(alpha[0].tolist(), of_head, strict=True)
    ]
    same(policies.dms_lifespans(alpha, size, **options), want)


@given(numbers(SCORES), WINDOWS, st.sampled_from([-math.inf, -4, 0.0, 1.0, math.inf]))
def test_kvzap_a_key_below_the_threshold_leaves_after_the_window(case, window, threshold):
    """Keys with a score below the threshold are pruned, except the last `window`."""
    (score, options), (size, of_head) = case, per_head(window, case[0].shape[1])
    row = Row(score.shape[-1], **options)
    want = [
        row.mask(lambda i, j, s=s, w=w: i - j < w or not s[j] < threshold)
        for s, w in zip(score[0].tolist(), of_head, strict=True)
    ]
    same(policies.kvzap_lifespans(score, threshold, size, **options), want)


# Multiples of 1/4: all sums are exact, so that D = delta is met.
@given(
    numbers(st.sampled_from([0.0, -0.25, -0.5, -1.0, -3.0, -math.inf, math.nan])),
    st.sampled_from([0.0, -0.25, -1.0, -2.5, -math.inf]),
)
def test_fox_a_key_dies_where_its_decay_falls_below_delta(case, delta):
    """D_ij is the sum of log forget gates over j < t <= i, and pairs with D_ij < delta are pruned, or with weight 0."""
    log_forget, options = case
    row = Row(log_forget.shape[-1], **options)

    def pruned(gates, i, j):
        decay = sum(gates[t] for t in range(j + 1, i + 1) if row.real[t])
        return decay < delta or decay == -math.inf

    # A key that is pruned stays so: D never rises.  (After a NaN nothing is below delta.)
    want = [
        row.mask(lambda i, j, g=g: not any(pruned(g, t, j) for t in range(j, i + 1))) for g in log_forget[0].tolist()
    ]
    same(policies.fox_lifespans(log_forget, delta, **options), want)
    per_head_delta = torch.full(log_forget.shape[:2], delta)
    same(policies.fox_lifespans(log_forget.double(), per_head_delta, **options), want)


@given(numbers(SCORES), WINDOWS)
def test_hax_keeps_the_cumulative_top_k(case, window):
    """Each query attends to the k keys with the highest scores among those at or before it."""
    (score, options), (size, of_head) = case, per_head(window, case[0].shape[1])
    row = Row(score.shape[-1], **options)
    want = []
    for s, w in zip(score[0].tolist(), of_head, strict=True):

        def chosen(i, j, s=s, w=w):
            before = [t for t in range(row.start[i], i + 1) if row.real[t] and s[t] != -math.inf]
            return j in sorted(before, key=lambda t: rank(s[t], t))[-w:]

        want.append(row.mask(chosen))
    same(policies.hax_lifespans(score, size, **options), want)


def trimmed(log_beta, capacity, chunk, row):
    """[K][K]: the cache of TRIM-KV, one token at a time, in exact arithmetic."""
    alive: list[tuple[int, int]] = []
    seen, steps = [], 0
    for t in range(row.length):
        if row.start[t] == t:
            alive = []
        if row.real[t]:
            alive, steps = [*alive, (t, steps)], steps + 1

        def score(entry, now=steps - 1):
            j, step = entry
            if math.isfinite(log_beta[j]):
                return (False, Fraction(log_beta[j]) * (now - step), j)
            return rank(log_beta[j] if math.isnan(log_beta[j]) or step < now else 0.0, j)

        while (t + 1) % chunk == 0 and len(alive) > capacity:
            alive.remove(min(alive, key=score))
        seen.append([j in dict(alive) for j in range(row.length)])
    return seen


@given(numbers(LOGARITHMS), WINDOWS, st.integers(1, 4))
def test_trim_kv_evicts_the_smallest_decayed_score(case, capacity, chunk):
    """When the cache exceeds its budget, the token with the smallest beta_j ** (t - j) is evicted."""
    (log_beta, options), (size, of_head) = case, per_head(capacity, case[0].shape[1])
    row = Row(log_beta.shape[-1], **options)
    want = [trimmed(b, m, chunk, row) for b, m in zip(log_beta[0].tolist(), of_head, strict=True)]
    same(policies.trim_kv_lifespans(log_beta, size, chunk=chunk, **options), want)


@given(st.integers(1, 14), WINDOWS, st.integers(0, 4), st.data())
def test_streaming_llm_and_moa_see_sinks_and_a_window(length, window, sinks, data):
    """The first tokens of the text and the last `window`; MoA's window is what its span leaves beside the sinks."""
    case = data.draw(numbers(st.just(0.0), max_length=length))
    options, length = case[1], case[0].shape[-1]
    key, row = torch.randn(1, 2, length, 4), Row(length, **options)

    def sees(w):
        def within(i, j):
            return i - j < w or j in [t for t in range(row.start[i], i + 1) if row.real[t]][:sinks]

        return row.mask(within)

    want = [sees(w) for w in (window if isinstance(window, list) else [window])]
    same(policies.streaming_llm_lifespans(key, window, sinks=sinks, **options), want)
    of_head = window if isinstance(window, list) else [window] * 2
    alpha = [sinks + w - 0.25 * (length + 3) for w in of_head]
    moa = policies.moa_lifespans(key, alpha, [0.25, 0.25], sinks=sinks, length=length + 3, **options)
    same(moa, [sees(w) for w in of_head])


def test_moa_rounds_down_and_grows_with_the_length():
    key = torch.randn(1, 2, 20, 4)
    moa = policies.moa_lifespans(key, (2, 0.5), (0, 0.3), sinks=1)  # spans 2 and 6: windows of 1 and 5
    assert torch.equal(moa.death[0, 0, 1:], torch.arange(2, 21, dtype=torch.int32))
    assert torch.equal(moa.death[0, 1, 1:], torch.arange(6, 25, dtype=torch.int32).clamp(max=20))
    assert moa.death[0, :, 0].tolist() == [20, 20]


@pytest.mark.parametrize("name", ["dms", "kvzap", "fox", "hax", "trim_kv"])
def test_the_matrix_of_the_docstring(name):
    """Those that draw one."""
    got, want = {
        "dms": lambda: (policies.dms_lifespans(torch.tensor([[[1.0, -1, 1, 1]]]), 2), [2, 4, 4, 4]),
        "kvzap": lambda: (policies.kvzap_lifespans(torch.tensor([[[-5.0, 0, -5, -5]]]), -4, 2), [2, 4, 4, 4]),
        "fox": lambda: (policies.fox_lifespans(torch.tensor([[[-1.0, -1, -4, -1]]]), -5.0), [3, 4, 4, 4]),
        "hax": lambda: (policies.hax_lifespans(torch.tensor([[[3.0, 1, 2, 5]]]), 2), [4, 2, 3, 4]),
        "trim_kv": lambda: (policies.trim_kv_lifespans(torch.tensor([[[0.9, 0.6, 0.8, 0.5]]]).log(), 2), [3, 2, 4, 4]),
    }[name]()
    assert got.birth.tolist() == [[[0, 1, 2, 3]]]
    assert got.death.tolist() == [[want]]
