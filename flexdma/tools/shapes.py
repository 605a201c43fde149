"""The shapes that are measured, and their random inputs."""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexdma.lowerings.default_options import block_size_of
from flexdma.packing.rows import FoldedRows
from flexdma.tools.cost_model.pairs import shown_pairs

# As is customary: a fused backward has five matrix products, the forward two.
BACKWARD = 2.5


@dataclass(frozen=True)
class Shape:
    """N positions, window w, heads and head size, forward only or with the backward; B = 1."""

    length: int
    window: int
    backward: bool
    query_heads: int = 8
    heads: int = 2
    size: int = 64
    flex: bool = False  # compare with causal FlexAttention too
    every: bool = False  # compare with all contenders: also unpacked FlexAttention, dense masks, peers

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.heads

    def __str__(self) -> str:
        what = "forward + backward" if self.backward else "forward"
        return f"{what}, N={self.length} w={self.window}"

    def sizes(self) -> dict[str, Any]:
        """All fields except flex and every."""
        return {name: value for name, value in asdict(self).items() if name not in ("flex", "every")}

    def forward(self) -> "Shape":
        """The same shape without the backward."""
        return replace(self, backward=False)

    def useful_flops(self, pairs: str = "selected") -> float:
        """4 D per pair of a query and a visible key, plus 2.5 times as much for the backward.

        pairs: "selected": N w, as in the targets, although the first w queries see fewer keys; "causal": N (N + 1) / 2.
        """
        selected = self.length * min(self.window, self.length)
        count = selected if pairs == "selected" else float(shown_pairs(self.length, self.length))
        return 4 * count * self.size * self.query_heads * (1 + BACKWARD * self.backward)


def default_blocks_and_rows(
    shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[int, int], FoldedRows]:
    """(rows, keys) of the mask blocks that the flex lowering takes for this call by default, and the rows of a KV head."""
    blocks = block_size_of(device, dtype, shape.size, shape.group, shape.backward)
    return blocks, FoldedRows.of(shape.length, shape.group, blocks[0], device.type)


def inputs(shape: Shape, device: str, dtype: torch.dtype) -> list[Tensor]:
    """query, key, value in dtype, gate (iid) in float32; B = 1.  Drawn on the device, which is faster for long sequences."""
    random: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    sizes = [(1, h, shape.length, shape.size) for h in (shape.query_heads, shape.heads, shape.heads)]
    tensors = [torch.randn(size, **random).to(dtype) for size in sizes]
    gate = torch.randn(1, shape.heads, shape.length, **random)
    return [t.requires_grad_(shape.backward) for t in (*tensors, gate)]
