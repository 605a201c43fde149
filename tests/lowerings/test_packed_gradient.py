"""The gradient of packing: each key's is the sum over its pieces, without atomic operations."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexdma import causal_top_w, pack, packed_layout
from flexdma.lowerings.packed_keys import TAIL, at_places, sum_of_pieces
from tests.lifespans.gate_strategies import gates


@given(gates(max_length=60), st.integers(1, 5), st.data())
def test_a_key_has_the_sum_of_its_pieces(gate, window, data):
    length = gate.shape[-1]
    queries = data.draw(st.integers(1, length))
    packing = pack(causal_top_w(gate, window), packed_layout(queries, length, window), queries=queries)
    placed = torch.randn(*packing.order.shape, 2, dtype=torch.float64)
    got = sum_of_pieces(placed, packing.pieces, packing.starts)
    taken = (packing.death > packing.birth)[..., None]
    want = torch.zeros(*gate.shape, 2, dtype=torch.float64)
    want.scatter_add_(2, packing.order.long()[..., None].expand_as(placed), torch.where(taken, placed, 0.0))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(2, 3, 100), (2, 3, 100, 5)])
def test_a_packing_shared_by_all_heads(shape):
    lifespans = causal_top_w(torch.randn(2, 1, 100), 4)
    packing = pack(lifespans, packed_layout(100, 100, 4), queries=100)
    packing = packing._replace(order=packing.order.expand(2, 3, -1))
    keys = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    taken = (packing.death > packing.birth).expand(2, 3, -1)
    taken = taken if len(shape) == 3 else taken[..., None]

    def seen(keys):
        return torch.where(taken, at_places(keys, packing, needs_gradient=True), 0.0)

    assert torch.autograd.gradcheck(seen, keys)


def test_places_without_a_key_are_summed_in_small_bags():
    """Of a hundred thousand independent gates most places are unused, and one thread would loop over all of them."""
    lifespans = causal_top_w(torch.randn(1, 1, 10_000), 8)
    packing = pack(lifespans, packed_layout(10_000, 10_000, 8, block_size=(128, 128)), queries=10_000)
    assert packing.order.shape[-1] - packing.starts[0, 0, -1] > 100 * TAIL
    placed = torch.ones(*packing.order.shape, 3)
    pieces = torch.diff(packing.starts, dim=-1)
    assert torch.equal(
        sum_of_pieces(placed, packing.pieces, packing.starts), pieces[..., None].expand(-1, -1, -1, 3).float()
    )
