"""Packing: every piece of every lifespan has one place, and the bounds of docs/packing.md hold for all gates."""

import pytest
import torch
from hypothesis import given, settings, target
from hypothesis import strategies as st

from flexdma import Lifespans, above_threshold, causal_top_w, global_top_w, pack, packed_layout
from flexdma.packing import Layout
from flexdma.packing.block_index import block_index
from flexdma.packing.places import layout_in_order
from flexdma.packing.rows import FoldedRows
from flexdma.packing.schedule import schedule
from tests.lifespans.gate_strategies import gates


def visited_blocks(lifespans, capacity, rows, columns, ranked=True):
    """The number of key blocks that each row block visits."""
    queries = lifespans.birth.shape[-1]
    sizes = {"capacity": capacity, "block_size": (rows, columns), "ranked": ranked}
    _, index = schedule(lifespans, rows=FoldedRows(queries, group=1), **sizes, transposed=False)
    return index.visited()


def test_the_example_of_the_docstring():
    birth, death = torch.tensor([[[0, 1, 2, 3, 4, 5]]]).int(), torch.tensor([[[2, 6, 3, 6, 6, 6]]]).int()
    packing = pack(Lifespans(birth, death), Layout(period=3, periods=2, places=5), queries=6)
    assert packing.order.tolist() == [[[0, 1, 2, 2, 2, 1, 3, 4, 5, 5]]]  # an unused place repeats a neighbour's key
    assert packing.birth.tolist() == [[[0, 1, 2, 0, 0, 3, 3, 4, 5, 0]]]
    assert packing.death.tolist() == [[[2, 3, 3, 0, 0, 6, 6, 6, 6, 0]]]
    assert packing.starts.tolist() == [[[0, 1, 3, 4, 5, 6, 7]]]
    assert packing.pieces.tolist() == [[[0, 1, 5, 2, 6, 7, 8, 0, 0, 0]]]


@st.composite
def hostile_lifespans(draw):
    """Gates of few values in runs, so that hypothesis can make plateaus, stairs and long lifespans; some selection."""
    runs = draw(
        st.lists(st.tuples(st.integers(-8, 8), st.integers(-3, 3), st.integers(1, 40)), min_size=1, max_size=12)
    )
    gate = torch.cat([start + slope * torch.arange(count) for start, slope, count in runs]).float()[None, None]
    window, sinks, recent = draw(st.integers(4, 16)), draw(st.integers(0, 2)), draw(st.integers(0, 4))
    choose = draw(st.sampled_from([causal_top_w, global_top_w, above_threshold]))
    lifespans = choose(gate, window_size=window, sinks=sinks, recent=recent)
    return lifespans, window + sinks + recent


cases = st.one_of(
    hostile_lifespans(), gates(max_length=200, kinds=("ties", "floats")).map(lambda g: (causal_top_w(g, 8), 8))
)


@given(cases, st.integers(1, 3), st.sampled_from([(8, 4), (4, 2), (16, 1), (5, 3)]), st.data())
def test_every_piece_of_every_lifespan_has_one_place(case, group, block_size, data):
    lifespans, capacity = case
    length = lifespans.birth.shape[-1]
    queries = data.draw(st.integers(1, length))
    sizes = {"block_size": block_size, "group": group}
    layouts = [packed_layout(queries, length, capacity, ranked=ranked, **sizes) for ranked in (True, False)]
    layout = data.draw(st.sampled_from([*layouts, layout_in_order(queries, length, **sizes)]))
    packing = pack(lifespans, layout, queries=queries)
    period, periods, places, *_ = layout
    assert period * group % block_size[0] == 0
    assert places % block_size[1] == 0

    query = torch.arange(queries)[:, None]
    position = query + length - queries
    birth, death = (bound.unsqueeze(-2) for bound in lifespans)
    seen = (birth <= position) & (position < death)  # [B, H, Q, K]
    at_place = (packing.birth.unsqueeze(-2) <= query) & (query < packing.death.unsqueeze(-2))  # [B, H, Q, L]
    times_seen = torch.zeros(seen.shape, dtype=torch.int32)
    times_seen.scatter_add_(-1, packing.order.unsqueeze(-2).expand_as(at_place).long(), at_place.int())
    assert torch.equal(times_seen, seen.int())

    start = torch.arange(periods * places) // places * period
    taken = packing.death > packing.birth
    assert (packing.birth >= start)[taken].all()
    assert (packing.death <= start + period)[taken].all()
    order = packing.death if layout.by_death else packing.order
    ends = torch.where(taken, order, length + period).unflatten(-1, (periods, places))
    assert torch.equal(ends, ends.sort(-1).values), "places in order, those without a key last"


@given(cases, st.data())
def test_pieces_list_the_places_of_each_key(case, data):
    lifespans, capacity = case
    length = lifespans.birth.shape[-1]
    queries = data.draw(st.integers(1, length))
    packing = pack(lifespans, packed_layout(queries, length, capacity), queries=queries)
    taken = packing.death > packing.birth
    for b, h in [(b, h) for b in range(taken.shape[0]) for h in range(taken.shape[1])]:
        starts = packing.starts[b, h].tolist()
        for key in range(length):
            mine = packing.pieces[b, h, starts[key] : starts[key + 1]]
            places = (taken[b, h] & (packing.order[b, h] == key)).nonzero()[:, 0]
            assert mine.tolist() == places.tolist()
        assert not packing.pieces[b, h, starts[-1] :].any()


def test_a_place_without_a_key_repeats_one_of_its_block():
    """So that a NaN reaches no further block."""
    lifespans = causal_top_w(torch.randn(1, 1, 3000), 100)
    packing = pack(lifespans, packed_layout(3000, 3000, 100, block_size=(32, 16)), queries=3000)
    order, taken = (t.unflatten(-1, (-1, 16))[0, 0] for t in (packing.order, packing.death > packing.birth))
    mixed = [(set(o[t].tolist()), set(o[~t].tolist())) for o, t in zip(order, taken, strict=True) if t.any()]
    assert any(empty for _, empty in mixed)
    assert all(empty <= keys for keys, empty in mixed)


def hostile_gates(length, window):
    """Families that are bad for one order or another; for most of them natural order visits nearly all blocks."""
    j, noise = torch.arange(length, dtype=torch.float32), torch.randn(length)
    yield "iid", noise
    yield "rising", noise + 6 * j / length
    yield "falling", noise - 3 * j / length
    yield "bursts", 0.3 * noise + 2 * torch.sin(j / 97)
    yield "one survivor per block", torch.where(j % 128 == 0, length - j, -j)
    yield "survivors of every age", torch.where(j % 7 == 0, torch.rand(length) ** 8 * 1e3, noise)
    yield "evicted in reverse", torch.where((j // window) % 2 == 0, -j, j)
    yield "evicted all at once", torch.where((j // (2 * window)) % 2 == 0, -j, j)
    yield "ties", noise.mul(2).round()


def bounds(length, capacity, rows, columns, ranked=True):
    """The bounds of docs/packing.md on the mean over row blocks and on each of them."""
    period, periods, places, *_ = packed_layout(length, length, capacity, block_size=(rows, columns), ranked=ranked)
    if periods == 1:
        return (places // columns,) * 2
    row_blocks, whole = -(-length // rows), periods * period // rows
    return ((capacity + (period + rows) / 2) / columns + 1) * whole / row_blocks, places // columns


@pytest.mark.parametrize(("length", "window"), [(4096, 128), (8192, 512)])
def test_hostile_gates_stay_below_the_bounds(length, window):
    for name, gate in hostile_gates(length, window):
        for ranked in (True, False):
            visited = visited_blocks(causal_top_w(gate[None, None], window), window, 128, 128, ranked).double()
            average, largest = bounds(length, window, 128, 128, ranked)
            assert visited.mean() <= average, name
            assert visited.max() <= largest, name


@given(cases)
@settings(max_examples=200)
def test_no_gate_exceeds_the_bounds(case):
    """Hypothesis searches for gates near the bounds, with the distance as its target."""
    lifespans, capacity = case
    visited = visited_blocks(lifespans, capacity, 4, 4).double()
    average, largest = bounds(lifespans.birth.shape[-1], capacity, 4, 4)
    target(visited.mean(-1).max().item() / average, label="average / bound")
    target(visited.max().item() / largest, label="largest / bound")
    assert visited.mean(-1).max() <= average
    assert visited.max() <= largest


@pytest.mark.parametrize("queries", [1, 700, 2048, 2049, 5000, 2**20])
def test_a_key_has_two_places_at_most_on_average(queries):
    for capacity in (1, 64, 1024):
        layout = packed_layout(queries, queries, capacity, block_size=(128, 128), group=4)
        assert layout.period * layout.periods >= queries
        assert layout.periods * layout.places < 2 * (queries + 128)
    layout = packed_layout(2**20, 2**20, 1024, block_size=(128, 128), group=4)
    assert layout == Layout(period=2048, periods=512, places=3072)


def test_few_queries_of_many_keys_have_few_places():
    assert packed_layout(1, 2**20, 1024, block_size=(128, 128), group=4).places == 1152


def test_packing_beats_natural_order_where_it_matters():
    lifespans = causal_top_w(torch.randn(1, 1, 16384), 512)
    natural = block_index(*lifespans, rows=FoldedRows(16384, 1), block_size=(128, 128)).visited()
    packed = visited_blocks(lifespans, 512, 128, 128).sum().item()
    assert packed * 5 < natural.sum().item()
    ideal = 512 / 128 * 16384 / 128
    assert packed < 1.4 * ideal
