"""Packing: a permutation, and never more blocks than the bound that docs/packing.md proves."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdma import Lifespans, causal_top_w, pack
from flexdma.block_metadata import block_metadata
from flexdma.packing import CLASS_BASE, FIRST_CLASS
from tests.gate_strategies import gates


def visited_blocks(lifespans, order, rows, columns):
    """Visited key blocks per row block, in total, with the keys in this order."""
    birth, death = (t.gather(-1, order) for t in lifespans)
    partial, _, full, _ = block_metadata(birth, death, birth.shape[-1], 1, rows, columns, False)
    return (partial + full).sum(-1)


def test_the_example_of_the_docstring():
    birth, death = torch.tensor([[[0, 1, 2, 3, 4]]]).int(), torch.tensor([[[2, 5, 3, 3, 5]]]).int()
    assert pack(Lifespans(birth, death), 1).tolist() == [[[0, 2, 4, 1, 3]]]


def test_keys_dead_before_the_first_query_go_last():
    birth, death = torch.tensor([[[0, 1, 2, 3]]]).int(), torch.tensor([[[2, 4, 3, 4]]]).int()
    assert pack(Lifespans(birth, death), 4, first_query=2).tolist() == [[[2, 1, 3, 0]]]


@given(gates(), st.integers(1, 12))
def test_is_a_permutation_with_the_never_visible_last(gate, window):
    lifespans = causal_top_w(gate, window)
    order = pack(lifespans, window)
    assert torch.equal(order.sort(-1).values, torch.arange(gate.shape[-1]).expand_as(order))
    lives = (lifespans.death > lifespans.birth).gather(-1, order)
    assert torch.equal(lives, lives.sort(-1, descending=True).values)


def bound(length, window, rows, columns):
    classes = max(0, math.ceil(math.log(length / (FIRST_CLASS * window), CLASS_BASE))) + 1
    return (7 * window + 2 * rows) / columns + 2 * classes


def hostile_gates(length, window):
    """Families that hurt one order or another; natural order visits nearly all blocks for most of them."""
    j, noise = torch.arange(length, dtype=torch.float32), torch.randn(length)
    yield "iid", noise
    yield "rising", noise + 6 * j / length
    yield "falling", noise - 3 * j / length
    yield "bursts", 0.3 * noise + 2 * torch.sin(j / 97)
    yield "one survivor per block", torch.where(j % 128 == 0, length - j, -j)
    yield "survivors of every age", torch.where(j % 7 == 0, torch.rand(length) ** 8 * 1e3, noise)
    yield "evicted in reverse", torch.where((j // window) % 2 == 0, -j, j)
    yield "ties", noise.mul(2).round()


@pytest.mark.parametrize(("length", "window"), [(4096, 128), (8192, 512)])
def test_hostile_gates_stay_below_the_bound(length, window):
    for name, gate in hostile_gates(length, window):
        lifespans = causal_top_w(gate[None, None], window)
        visited = visited_blocks(lifespans, pack(lifespans, window), 128, 128).item() / (length // 128)
        assert visited <= bound(length, window, 128, 128), name


@given(gates(max_length=200, kinds=("ties", "floats", "sorted", "reversed")), st.integers(4, 16))
def test_no_gate_exceeds_the_bound(gate, window):
    length = gate.shape[-1]
    lifespans = causal_top_w(gate, window)
    row_blocks = -(-length // 4)
    visited = visited_blocks(lifespans, pack(lifespans, window), 4, 4).max().item() / row_blocks
    assert visited <= bound(length, window, 4, 4)


def test_packing_beats_natural_order_where_it_matters():
    lifespans = causal_top_w(torch.randn(1, 1, 16384), 512)
    natural = torch.arange(16384).expand(1, 1, -1)
    packed = visited_blocks(lifespans, pack(lifespans, 512), 128, 128).item()
    assert packed * 5 < visited_blocks(lifespans, natural, 128, 128).item()
    ideal = 512 / 128 * 16384 / 128
    assert packed < 2.3 * ideal
