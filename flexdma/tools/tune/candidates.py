"""The sizes that `tune` measures: kernel options on a GPU, mask blocks on a CPU, where blocks are the tiles of the kernel."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from flexdma.lowerings.default_options import default_block_size
from flexdma.tools.tile_grid import sizes_of

# The fewest keys of a mask block: narrower ones gain 1 % and double the lists of blocks (docs/kernels.md).
NARROWEST = 64
CPU_BLOCKS = ((128, 64), (64, 32), (256, 32), (128, 128), (256, 64), (64, 64), (128, 16))


@dataclass(frozen=True)
class Candidate:
    """One setting of a call."""

    name: str
    block_size: tuple[int, int]
    kernel_options: Mapping[str, int] = field(default_factory=dict)


def candidates(
    device_type: str, head_dim: int, dtype: torch.dtype, phase: str, forward: Mapping[str, int]
) -> list[Candidate]:
    """The candidates of a phase ("inference" or "training").

    forward: options of the forward in training, so that only the backward's sizes vary there.
    """
    if device_type == "cpu":
        return [Candidate(f"blocks of {rows}x{keys}", (rows, keys)) for rows, keys in CPU_BLOCKS]
    kernel = "forward" if phase == "inference" else "backward"
    rows, keys = default_block_size(device_type)
    # In inference smaller blocks, where the tile fits: fewer are visited.
    return [
        Candidate(
            f"{kernel} {sizes}",
            (rows, max(sizes.keys, NARROWEST) if phase == "inference" else keys),
            {**forward, **sizes.options(kernel)},
        )
        for sizes in sizes_of(kernel, head_dim, dtype)
    ]
