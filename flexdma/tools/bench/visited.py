"""How many pairs of a query and a key each way of attending computes, over those that the mask shows."""

import torch
from torch import Tensor

from flexdma import causal_top_w
from flexdma.lifespans import Lifespans
from flexdma.lowerings.flex import default_block_size
from flexdma.lowerings.fused import block_size_for
from flexdma.lowerings.gather import BLOCK_SIZE as QUERY_BLOCK
from flexdma.packing.block_index import BlockIndex, block_index
from flexdma.packing.schedule import schedule
from flexdma.rounding import ceil_div
from flexdma.tools.bench.contenders import DENSE, FLEX_CAUSAL, FLEX_TILE, NATURAL
from flexdma.tools.gate_families import gate_families
from flexdma.tools.shapes import Shape
from flexdma.tools.whole_calls import CAUSAL, COMPILED, COMPILED_GATHER, EAGER


@torch.no_grad()
def visited_over_ideal(shape: Shape, gate: Tensor) -> dict[str, float]:
    """Contender -> pairs that it computes over pairs that the mask shows.  `gate`: [1, Hkv, N]."""
    alive = causal_top_w(gate, shape.window)
    shown = (alive.death - alive.birth).sum().item() * shape.group
    block_size = default_block_size(gate.device.type)
    blocks = ceil_div(shape.length, QUERY_BLOCK)
    slots = min(shape.window, shape.length) + QUERY_BLOCK
    gathered = shape.query_heads * blocks * QUERY_BLOCK * slots / shown
    fused_block = block_size_for(alive, shape.length, shape.window)
    everything = shape.query_heads * shape.length * (shape.length + 1) / 2 / shown
    return {
        CAUSAL: everything,
        FLEX_CAUSAL: everything,
        # Inference gathers each block's living keys and no more.
        EAGER: gathered if shape.backward else living_pairs(alive, fused_block) * shape.group / shown,
        COMPILED_GATHER: gathered,
        COMPILED: _packed_pairs(alive, shape.length, shape.window, block_size, shape.group) / shown,
        NATURAL: _pairs_in_order(alive, shape.length, (FLEX_TILE, FLEX_TILE)) * shape.group / shown,
        DENSE: shape.query_heads * shape.length**2 / shown,
    }


def living_pairs(alive: Lifespans, block: int) -> int:
    """Queries of each block times the keys alive in it, per query head of a group."""
    birth, death = alive
    length = birth.shape[-1]
    lives = death > birth
    born = lives.cumsum(-1)  # keys are in their natural order
    gone = torch.zeros(*birth.shape[:-1], length + 1, dtype=torch.int64, device=birth.device)
    gone = gone.scatter_add_(-1, death.long(), lives.long()).cumsum(-1)
    starts = torch.arange(0, length, block, device=birth.device)
    last = (starts + block).clamp(max=length) - 1
    return int(((born[..., last] - gone[..., starts]) * block).sum())


def packing_ratios(length: int, window: int, rows: int, columns: int) -> dict[str, tuple[float, float]]:
    """Family -> visited blocks over the ideal N w, in natural order and packed; tiles of rows positions by columns keys."""
    ratios = {}
    for name, gate in gate_families(length).items():
        alive = causal_top_w(gate[None, None], window)
        shown = (alive.death - alive.birth).sum().item()
        natural = _pairs_in_order(alive, length, (rows, columns)) / shown
        ratios[name] = (natural, _packed_pairs(alive, length, window, (rows, columns)) / shown)
    return ratios


def _pairs_in_order(alive: Lifespans, length: int, tile: tuple[int, int]) -> int:
    """In the visited tiles, keys in their natural order."""
    return _pairs(block_index(*alive, queries=length, block_size=tile), tile)


def _packed_pairs(alive: Lifespans, length: int, window: int, tile: tuple[int, int], group: int = 1) -> int:
    """In the visited tiles, keys packed and `group` query heads folded into the rows."""
    _, index = schedule(alive, queries=length, group=group, capacity=window, block_size=tile, transposed=False)
    return _pairs(index, tile)


def _pairs(index: BlockIndex, tile: tuple[int, int]) -> int:
    return int(index.visited().sum()) * tile[0] * tile[1]
