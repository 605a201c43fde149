"""What a system visits: the blocks of a kernel over the pairs of its mask, on the seven families of gates."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from flexdma import Lifespans
from flexdma.lifespans.visible import births_are_positions, most_visible
from flexdma.packing.block_index import count_visited
from flexdma.packing.choice import packing_saves
from flexdma.packing.rows import FoldedRows
from flexdma.packing.schedule import schedule
from flexdma.tools.gate_families import gate_families
from flexdma.tools.policies.examples import Mask, Scores
from flexdma.tools.policies.systems import System


class Visited(NamedTuple):
    """Pairs in visited blocks over pairs of the mask: in the keys' own order, and as `lifespan_attention` orders them.

    packed: None for masks that are not lifespans, or have several intervals a key.
    """

    own_order: float
    packed: float | None


def families(length: int, window: int, block: int) -> Iterator[tuple[str, Scores]]:
    """Name -> scores of each family of gates."""
    for name, gate in gate_families(length).items():
        yield name, Scores(gate[None, None], window, block)


def mean_visited(system: System, length: int, window: int, block: int) -> Visited:
    """The means over the families of gates; the system must have an example, and its functions."""
    assert system.example is not None
    found = [visited(system.example(scores), length, block) for _, scores in families(length, window, block)]
    packed = [each.packed for each in found if each.packed is not None]
    own = sum(each.own_order for each in found) / len(found)
    return Visited(own, sum(packed) / len(packed) if packed else None)


def visited(mask: Mask, length: int, block: int) -> Visited:
    """The ratios of one mask, in blocks of `block` queries by `block` keys."""
    pairs = int(visible(mask, length).sum())
    area, tile = block**2, (block, block)
    if isinstance(mask, BlockMask):
        full = mask.full_kv_num_blocks
        blocks = int(mask.kv_num_blocks.sum()) + (0 if full is None else int(full.sum()))
        rows, columns = mask.BLOCK_SIZE
        return Visited(blocks * rows * columns / pairs, None)
    if not isinstance(mask, Lifespans):
        if len(mask) > 1:
            tiles = visible(mask, length).unflatten(1, (-1, block)).unflatten(0, (-1, block)).any(-1).any(1)
            return Visited(int(tiles.sum()) * area / pairs, None)
        mask = mask[0]
    own = int(count_visited(*mask, queries=length, block_size=tile))
    facts: dict[str, Any] = {
        "rows": FoldedRows(length, group=1), "capacity": max(1, most_visible(mask, length)), "block_size": tile,
        "any_births": not births_are_positions(mask), "ranked": False,
    }  # fmt: skip
    _, index = schedule(mask, **facts, transposed=False, packed=packing_saves(mask, **facts))
    return Visited(own * area / pairs, int(index.visited().sum()) * area / pairs)


def visible(mask: Mask, length: int) -> Tensor:
    """The mask of head 0, dense: [K, K] bool."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    if isinstance(mask, BlockMask):
        zero = torch.zeros((), dtype=torch.int64)
        return mask.mask_mod(zero, zero, query, key).expand(length, length)
    parts = (mask,) if isinstance(mask, Lifespans) else mask
    seen = [(part.birth[0, 0] <= query) & (query < part.death[0, 0]) for part in parts]
    return torch.stack(seen).any(0)
