"""The order of keys: packed where that visits fewer blocks, their own where it does not."""

from typing import Any
from unittest import mock

import pytest
import torch

from flexdma import Lifespans, lifespan_attention
from flexdma.lifespans.visible import births_are_positions, most_visible
from flexdma.lowerings import attend
from flexdma.packing.choice import packing_saves
from flexdma.packing.places import layout_in_order, pack, packed_layout
from flexdma.packing.rows import FoldedRows
from flexdma.tools.mask_families import mask_families

LENGTH, ROWS, COLUMNS = 1024, 32, 16


def blocks_of(mask):
    """The number of tiles of a dense mask [H, rows, places] in which anything is visible."""
    rows, places = mask.shape[1:]
    mask = torch.nn.functional.pad(mask, (0, -places % COLUMNS, 0, -rows % ROWS))
    return int(mask.unflatten(-1, (-1, COLUMNS)).unflatten(1, (-1, ROWS)).any(-1).any(2).sum())


def seen(birth, death):
    query = torch.arange(LENGTH)[:, None]
    return (birth.unsqueeze(-2) <= query) & (query < death.unsqueeze(-2))


ONE_INTERVAL = {name: f.intervals[0] for name, f in mask_families(LENGTH, 2).items() if len(f.intervals) == 1}


@pytest.mark.parametrize("name", ONE_INTERVAL)
def test_keys_are_packed_where_fewer_blocks_are_visited(name):
    alive = ONE_INTERVAL[name]
    facts: dict[str, Any] = {
        "capacity": most_visible(alive, LENGTH),
        "any_births": not births_are_positions(alive),
        "ranked": False,
    }
    sizes: dict[str, Any] = {"block_size": (ROWS, COLUMNS), "group": 1}
    layouts = packed_layout(LENGTH, LENGTH, **facts, **sizes), layout_in_order(LENGTH, LENGTH, **sizes)
    packed, in_order = (blocks_of(seen(*pack(alive, layout, queries=LENGTH)[1:3])[0]) for layout in layouts)
    own = blocks_of(seen(*alive)[0])
    assert in_order <= own  # keys that no query sees leave no gap
    saves = packing_saves(alive, rows=FoldedRows(LENGTH, group=1), block_size=(ROWS, COLUMNS), **facts)
    assert saves == (packed < own)
    assert saves == name.startswith("random eviction")


def test_an_eager_call_chooses_the_order_and_the_caller_may():
    query, key = torch.randn(1, 2, LENGTH, 16), torch.randn(1, 2, LENGTH, 16)
    chosen = []
    with mock.patch.object(attend, "compiled_flex_attend", lambda *_, packed, **__: chosen.append(packed)):
        for name in ("sliding window", "random eviction, cache of N / 16"):
            for packed in (None, True, False):
                lifespan_attention(
                    query, key, key, ONE_INTERVAL[name], lowering="flex", packed=packed, block_size=(ROWS, COLUMNS)
                )
    assert chosen == [False, True, False, True, True, False]


def test_long_sequences_are_packed_without_counting():
    """The lists of blocks of keys in their own order would be as long as keys and values."""
    position = torch.arange(2**20, dtype=torch.int32).view(1, 1, -1)
    with mock.patch("flexdma.packing.choice.pack", side_effect=AssertionError):
        assert packing_saves(
            Lifespans(position, position + 1), rows=FoldedRows(2**20, group=4), capacity=1, block_size=(128, 32)
        )


def test_a_wrong_request_is_refused_by_name():
    query = torch.randn(1, 1, 8, 4)
    alive = Lifespans(torch.arange(8).view(1, 1, -1), torch.full((1, 1, 8), 8))
    with pytest.raises(TypeError, match="packed: expected a bool or None, got int"):
        lifespan_attention(query, query, query, alive, packed=1)  # type: ignore[arg-type]
    for lowering in ("gather", "dense"):
        with pytest.raises(ValueError, match=f"packed: expected None or True for lowering='{lowering}'"):
            lifespan_attention(query, query, query, alive, lowering=lowering, packed=False)
