"""Packing: a permutation, and never more blocks than the bound that docs/packing.md proves."""

import math

import pytest
import torch
from hypothesis import given, settings, target
from hypothesis import strategies as st

from flexdma import Lifespans, above_threshold, causal_top_w, global_top_w, pack
from flexdma.block_metadata import block_metadata
from flexdma.lowerings.flex import _schedule
from flexdma.packing import CLASS_BASE, FIRST_CLASS, most_visited
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


@st.composite
def hostile_lifespans(draw):
    """Gates of a small value range in runs, so that hypothesis can build plateaus, stairs and survivors; some selection."""
    runs = draw(
        st.lists(st.tuples(st.integers(-8, 8), st.integers(-3, 3), st.integers(1, 40)), min_size=1, max_size=12)
    )
    gate = torch.cat([start + slope * torch.arange(count) for start, slope, count in runs]).float()[None, None]
    window, sinks, recent = draw(st.integers(4, 16)), draw(st.integers(0, 2)), draw(st.integers(0, 4))
    choose = draw(st.sampled_from([causal_top_w, global_top_w, above_threshold]))
    lifespans = choose(gate, window_size=window, sinks=sinks, recent=recent)
    return lifespans, window + sinks + recent


@given(
    st.one_of(
        hostile_lifespans(), gates(max_length=200, kinds=("ties", "floats")).map(lambda g: (causal_top_w(g, 8), 8))
    )
)
@settings(max_examples=200)
def test_no_gate_exceeds_the_bounds(case):
    """On average over row blocks, and in any one of them; hypothesis is told how close it comes and searches for worse."""
    lifespans, alive = case
    length = lifespans.birth.shape[-1]
    birth, death = (t.gather(-1, pack(lifespans, alive)) for t in lifespans)
    partial, _, full, _ = block_metadata(birth, death, length, 1, 4, 4, False)
    visited = (partial + full).double()
    average, largest = visited.mean(-1).max().item(), visited.max().item()
    allowed = bound(length, alive, 4, 4), most_visited(length, alive, 4, 4)
    target(average / allowed[0], label="average / bound")
    target(largest / allowed[1], label="largest / bound")
    assert average <= allowed[0]
    assert largest <= allowed[1]


@given(hostile_lifespans(), st.integers(1, 3), st.data())
def test_capped_indices_say_the_same(case, group, data):
    lifespans, alive = case
    length = lifespans.birth.shape[-1]
    queries = data.draw(st.integers(1, length))
    rows, columns = data.draw(st.sampled_from([(8, 4), (4, 2), (16, 1)]))
    order, _, _, *capped = _schedule(*lifespans, queries, group, alive, rows, columns, False)
    birth, death = (t.gather(-1, order) for t in lifespans)
    number, indices, full_number, full_indices = block_metadata(birth, death, queries, group, rows, columns, False)
    assert torch.equal(capped[0], number)
    assert torch.equal(capped[2], full_number)
    for short, whole, count in ((capped[1], indices, number), (capped[3], full_indices, full_number)):
        assert short.is_contiguous()
        width = min(short.shape[-1], whole.shape[-1])
        assert count.max() <= width
        read = torch.arange(width) < count[..., None]
        assert torch.equal(short[..., :width][read], whole[..., :width][read])


def test_capped_indices_are_small_where_it_matters():
    """1M tokens, w = 1024, one KV head of 4 query heads in blocks of 128 x 128: 3.6 % of the whole index, proven."""
    assert most_visited(2**20, 1024, 33, 128) * 28 < 2**20 // 128


def test_packing_beats_natural_order_where_it_matters():
    lifespans = causal_top_w(torch.randn(1, 1, 16384), 512)
    natural = torch.arange(16384).expand(1, 1, -1)
    packed = visited_blocks(lifespans, pack(lifespans, 512), 128, 128).item()
    assert packed * 5 < visited_blocks(lifespans, natural, 128, 128).item()
    ideal = 512 / 128 * 16384 / 128
    assert packed < 2.3 * ideal
