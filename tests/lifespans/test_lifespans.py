"""Lifespans compared with literal matrices, with a heap that reads one key at a time, and with the specification."""

import heapq
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdma import Lifespans, above_threshold, causal_top_w, global_top_w, sliding_window
from flexdma.reference import dense_visibility
from tests.lifespans.gate_strategies import gates, selections

cases = gates().flatmap(lambda gate: st.tuples(st.just(gate), st.integers(1, 12), selections(gate.shape[-1])))


def matrix(lifespans: Lifespans) -> torch.Tensor:
    """[B, H, K, K] bool: query i (second to last) sees key j."""
    i = torch.arange(lifespans.birth.shape[-1])[:, None]
    return (i >= lifespans.birth.unsqueeze(-2)) & (i < lifespans.death.unsqueeze(-2))


def streamed(gate, window, sinks=0, recent=0, key_padding_mask=None, document_ids=None):
    """Rows of visible keys, one query at a time: a heap of the best `window` (gate, position) of the document so far.

    The first keys never enter the heap, the others when they are no longer recent.
    """
    length = len(gate)
    masked = [key_padding_mask is not None and not key_padding_mask[j] for j in range(length)]
    heap: list[tuple[bool, float, int]] = []
    first: list[int] = []
    last: list[int] = []
    rows = []
    for i in range(length):
        if i and document_ids is not None and document_ids[i] != document_ids[i - 1]:
            heap, first, last = [], [], []
        if not masked[i] and gate[i] != -math.inf:
            (first if len(first) < sinks else last).append(i)
        while last and last[0] <= i - recent:
            j = last.pop(0)
            heapq.heappush(heap, (math.isnan(gate[j]), math.inf if math.isnan(gate[j]) else gate[j], j))
            if len(heap) > window:
                heapq.heappop(heap)
        kept = {*(j for *_, j in heap), *first, *last}
        rows.append([j in kept for j in range(length)])
    return rows


def test_the_matrix_of_the_docstring():
    birth, death = causal_top_w(torch.tensor([[[3.0, 1.0, 2.0, 5.0]]]), 2)
    assert birth.tolist() == [[[0, 1, 2, 3]]]
    assert death.tolist() == [[[4, 2, 3, 4]]]
    assert matrix(Lifespans(birth, death))[0, 0].int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 0, 0, 1],
    ]

    birth, death = causal_top_w(torch.tensor([[[3.0, 1.0, 2.0, 5.0]]]), 1, recent=2)
    assert (birth.tolist(), death.tolist()) == ([[[0, 1, 2, 3]]], [[[4, 3, 4, 4]]])


@pytest.mark.parametrize(("sinks", "recent"), [(0, 0), (2, 0), (0, 5), (3, 5)])
def test_constant_gates_are_a_sliding_window(sinks, recent):
    gate, sizes = torch.zeros(1, 1, 50), {"sinks": sinks, "recent": recent}
    assert torch.equal(causal_top_w(gate, 7, **sizes).death, sliding_window(gate, 7, **sizes).death)
    assert causal_top_w(gate, 7, **sizes).death[0, 0].tolist() == [
        50 if j < sinks else min(j + 7 + recent, 50) for j in range(50)
    ]


def test_of_equal_gates_the_newer_wins():
    assert causal_top_w(torch.tensor([[[1.0, 1.0, 1.0]]]), 1).death.tolist() == [[[1, 2, 3]]]


def test_zero_and_minus_zero_are_equal():
    assert causal_top_w(torch.tensor([[[0.0, -0.0]]]), 1).death.tolist() == [[[1, 2]]]


def test_nan_ranks_highest_and_minus_infinity_is_never_visible():
    gate = torch.tensor([[[math.nan, math.inf, -math.inf, 1.0]]])
    assert causal_top_w(gate, 1).death.tolist() == [[[4, 1, 2, 3]]]
    # A key at -inf takes no place in the window and is neither a sink nor recent.
    assert causal_top_w(torch.tensor([[[-math.inf, 1.0]]]), 5, sinks=1, recent=2).death.tolist() == [[[0, 2]]]


def test_sinks_skip_left_padding_and_start_anew_in_each_document():
    gate = torch.zeros(1, 1, 6)
    padded = causal_top_w(gate, 1, sinks=1, key_padding_mask=torch.tensor([[False, False, True, True, True, True]]))
    assert padded.death.tolist() == [[[0, 1, 6, 4, 5, 6]]]
    documents = causal_top_w(gate, 1, sinks=1, document_ids=torch.tensor([[5, 5, 5, 2, 2, 2]]))
    assert documents.death.tolist() == [[[3, 2, 3, 6, 5, 6]]]


def test_each_head_may_have_its_own_window():
    gate = torch.randn(2, 3, 40)
    together = causal_top_w(gate, [1, 5, 40])
    for head, window in enumerate([1, 5, 40]):
        assert torch.equal(together.death[:, head], causal_top_w(gate[:, head : head + 1], window).death[:, 0])


def test_float64_gates_are_ranked_in_float64():
    gate = torch.tensor([[[1e9 + 1e-6, 1e9]]], dtype=torch.float64)
    assert causal_top_w(gate, 1).death.tolist() == [[[2, 1]]]
    assert causal_top_w(gate.float(), 1).death.tolist() == [[[1, 2]]]  # equal in float32, so the newer ranks higher


@given(cases)
def test_equals_a_heap_that_streams_one_key_at_a_time(case):
    gate, window, options = case
    got = matrix(causal_top_w(gate, window, **options))
    per_row = {name: value[0].tolist() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    for head in range(gate.shape[1]):
        assert got[0, head].tolist() == streamed(gate[0, head].tolist(), window, **per_row)


POLICIES = {"causal": causal_top_w, "global": global_top_w, "sliding": sliding_window}


@given(cases, st.sampled_from([*POLICIES, "threshold"]))
def test_equals_the_specification(case, selection):
    gate, window, options = case
    if selection == "threshold":
        got = above_threshold(gate, window_size=window, **options)
    else:
        got = POLICIES[selection](gate, window, **options)
    assert torch.equal(matrix(got), dense_visibility(gate, window_size=window, selection=selection, **options))


@given(cases, st.sampled_from([*POLICIES, "threshold"]))
def test_sinks_recent_keys_and_the_top_w_are_disjoint(case, selection):
    """Each query's keys, grouped in Python: as many sinks and recent keys as there are, and of the others the w best."""
    gate, window, options = case
    masks = {name: options[name] for name in ("key_padding_mask", "document_ids") if name in options}
    sinks, recent = options["sinks"], options["recent"]
    policy: Any = above_threshold if selection == "threshold" else POLICIES[selection]
    seen = matrix(policy(gate, window_size=window, **options))
    everything = matrix(causal_top_w(gate, gate.shape[-1], **masks))
    for head in range(gate.shape[1]):
        for i, (row, could) in enumerate(zip(seen[0, head].tolist(), everything[0, head].tolist(), strict=True)):
            real = [j for j, is_real in enumerate(could) if is_real]
            first, last = real[:sinks], [j for j in real[sinks:] if i - j < recent]
            others = [j for j in real[sinks:] if i - j >= recent]
            kept = [j for j in others if row[j]]
            assert all(row[j] for j in first + last)
            assert sum(row) == len(first) + len(last) + len(kept)
            assert len(kept) <= window
            if selection == "causal":  # the capacity is reached as soon as there are so many keys
                assert len(kept) == min(window, len(others))


@given(gates())
def test_the_threshold_alone_needs_no_window(gate):
    want = dense_visibility(gate, window_size=None, selection="threshold")
    assert torch.equal(matrix(above_threshold(gate)), want)
    assert torch.equal(matrix(above_threshold(gate, window_size=gate.shape[-1])), want)


@given(cases)
def test_a_key_once_evicted_never_returns_and_the_fields_keep_their_invariants(case):
    gate, window, options = case
    birth, death = causal_top_w(gate, window, **options)
    length = gate.shape[-1]
    assert birth.dtype == death.dtype == torch.int32
    assert birth.is_contiguous()
    assert death.is_contiguous()
    assert torch.equal(birth, torch.arange(length, dtype=torch.int32).expand_as(birth))
    assert ((birth <= death) & (death <= length)).all()
    # An upper bound on the keys of a query, on which the gather lowering relies.
    assert matrix(Lifespans(birth, death)).sum(-1).max() <= window + options["sinks"] + options["recent"]


@given(gates(kinds=("floats",)), st.integers(1, 12))
def test_only_the_order_of_gates_matters(gate, window):
    ranks = gate.nan_to_num(nan=torch.inf, posinf=3e38, neginf=-torch.inf).atan()
    ranks[gate.isposinf()] = 2.0
    ranks[gate.isnan()] = 3.0
    ranks[gate == -torch.inf] = -torch.inf
    # atan may make different floats equal; compare only where it did not.
    distinct = gate[0].nan_to_num(nan=9e38).unique().numel() == ranks[0].unique().numel()
    if distinct:
        assert torch.equal(causal_top_w(gate, window).death, causal_top_w(ranks, window).death)


@pytest.mark.parametrize("length", [127, 128, 1025, 4096])
def test_long_rows_equal_the_heap(length):
    gate = torch.randn(1, 1, length).mul(4).round()
    got = matrix(causal_top_w(gate, 64))[0, 0]
    assert got.tolist() == streamed(gate[0, 0].tolist(), 64)
