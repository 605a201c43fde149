"""The sizes that `inspect --grid` compiles and `tune` measures: tiles, warps and stages of FlexAttention's kernels."""

from itertools import product
from typing import NamedTuple

import torch

from flexdma.lowerings.default_options import backward_options, forward_options

Tiles = dict[int, dict[int, tuple[tuple[int, int], ...]]]
# Bytes of a number -> largest head size -> (rows, keys) of the forward's tile.
FORWARD: Tiles = {
    2: {128: ((128, 128), (128, 64), (128, 32), (64, 64)), 256: ((128, 64), (64, 64), (64, 32))},
    4: {64: ((128, 32), (64, 32)), 128: ((32, 64), (32, 32)), 256: ((32, 32), (16, 32))},
}
# The same for the tile in which the backward sums dK and dV, and with rows and keys exchanged dQ.
BACKWARD: Tiles = {
    2: {128: ((64, 128), (64, 64), (32, 64), (32, 128)), 256: ((64, 64), (32, 64), (32, 32))},
    4: {64: ((16, 16), (32, 32)), 128: ((16, 16), (16, 32)), 256: ((16, 16), (16, 32))},
}
WARPS, STAGES = (8, 4), (3, 2)


class Sizes(NamedTuple):
    """The sizes of one kernel."""

    rows: int
    keys: int
    warps: int
    stages: int

    def options(self, phase: str) -> dict[str, int]:
        """As FlexAttention's kernel options of the phase "forward" or "backward"."""
        named = forward_options if phase == "forward" else backward_options
        return dict(named(self.rows, self.keys, warps=self.warps, stages=self.stages))

    def __str__(self) -> str:
        return f"{self.rows}x{self.keys}, {self.warps} warps, {self.stages} stages"


def sizes_of(phase: str, head_dim: int, dtype: torch.dtype) -> list[Sizes]:
    """The grid of a phase.  Raises ValueError for heads that no tile of the grid is meant for."""
    tiles = (FORWARD if phase == "forward" else BACKWARD)[dtype.itemsize]
    for largest, chosen in tiles.items():
        if head_dim <= largest:
            return [Sizes(*tile, *rest) for tile, *rest in product(chosen, WARPS, STAGES)]
    raise ValueError(f"head_dim: expected at most {max(tiles)}, got {head_dim}")
