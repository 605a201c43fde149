"""Pairs of a query and a key that each contender computes, over the pairs that the mask shows."""

import torch
from torch import Tensor

from flexdma import causal_top_w
from flexdma.lifespans import Lifespans
from flexdma.lowerings.fused_cut import block_size_for
from flexdma.packing.rows import FoldedRows
from flexdma.tools.bench.contenders import DENSE, FLEX_CAUSAL, FLEX_TILE, NATURAL
from flexdma.tools.cost_model.counts import visited_pairs
from flexdma.tools.cost_model.pairs import gathered_pairs, shown_pairs
from flexdma.tools.gate_families import gate_families
from flexdma.tools.shapes import Shape, default_blocks_and_rows
from flexdma.tools.whole_calls import CAUSAL, COMPILED, COMPILED_DEFAULT, COMPILED_PLAIN, EAGER, PLAIN

VISITED = "visited_over_ideal"  # the metric of these ratios


@torch.no_grad()
def visited_over_ideal(shape: Shape, gate: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Contender -> pairs that it computes over pairs that the mask shows.  gate: [1, Hkv, N].  dtype: of the queries."""
    alive = causal_top_w(gate, shape.window)
    shown = (alive.death - alive.birth).sum().item() * shape.group
    block_size, rows = default_blocks_and_rows(shape, gate.device, dtype)
    alone = FoldedRows(shape.length, group=1)
    gathered = shape.query_heads * float(gathered_pairs(shape.length, shape.window)) / shown
    living = living_pairs(alive, block_size_for(alive, shape.length, shape.window)) * shape.group / shown
    everything = shape.query_heads * float(shown_pairs(shape.length, shape.length)) / shown
    return {
        CAUSAL: everything,
        FLEX_CAUSAL: everything,
        # The fused kernel gathers only the living keys of each block.
        EAGER: living,
        COMPILED_DEFAULT: living,
        PLAIN: gathered,
        COMPILED_PLAIN: gathered,
        COMPILED: visited_pairs(alive, rows, block_size, shape.window) / shown,
        NATURAL: visited_pairs(alive, alone, (FLEX_TILE, FLEX_TILE)) * shape.group / shown,
        DENSE: shape.query_heads * shape.length**2 / shown,
    }


def living_pairs(alive: Lifespans, block: int) -> int:
    """Sum over blocks of queries times keys alive in the block, per query head of a group."""
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
    """Family -> pairs in visited blocks over those that the mask shows, in natural order and packed.

    Tiles are `rows` positions by `columns` keys.
    """
    ratios, alone = {}, FoldedRows(length, group=1)
    for name, gate in gate_families(length).items():
        alive = causal_top_w(gate[None, None], window)
        shown = (alive.death - alive.birth).sum().item()
        natural, packed = (
            visited_pairs(alive, alone, (rows, columns), capacity) / shown for capacity in (None, window)
        )
        ratios[name] = (natural, packed)
    return ratios
