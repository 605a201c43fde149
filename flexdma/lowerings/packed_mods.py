"""The score_mod and mask_mod of packed keys and folded rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from flexdma.opaque import realize
from flexdma.packing.rows import FoldedRows
from flexdma.signatures import MaskMod, ScoreMod


class PackedBias(NamedTuple):
    """What a key adds to its logits, minus what a row subtracts; float32, buffers that every kernel can capture."""

    high: Tensor  # [B, Hkv, L]
    low: Tensor | None  # [B, Hkv, L]; None = 0
    reference_high: Tensor  # [B, Hkv, rows]
    reference_low: Tensor | None  # [B, Hkv, rows]; None = 0


def packed_mods(
    order: Tensor,
    birth: Tensor,
    death: Tensor,
    bias: PackedBias | None,
    score_mod: ScoreMod | None,
    *,
    rows: FoldedRows,
    keys: int,
) -> tuple[ScoreMod, MaskMod]:
    """score_mod and mask_mod of (row, place).

    order, birth, death: [B, Hkv, L], of a `Packing`.  score_mod: the caller's, of original heads and positions.
    """
    on_cpu = order.device.type == "cpu"
    high, low, reference_high, reference_low = bias or (None, None, None, None)
    query_position = None
    if score_mod is not None:
        query_position = realize(torch.arange(keys - rows.queries, keys, device=order.device))

    # Index each captured tensor once, in one step: FlexAttention has derivatives for this form only.
    def packed_score_mod(score: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if score_mod is not None and query_position is not None:
            position = query_position[rows.position(row)]
            score = score_mod(score, b, h * rows.group + rows.head(row), position, order[b, h, column])
        if high is not None and reference_high is not None:
            difference = high[b, h, column] - reference_high[b, h, row]
            if low is not None:
                rest = low[b, h, column]
                difference = difference + (rest if reference_low is None else rest - reference_low[b, h, row])
            score = score + difference
        # Inductor's C++ kernel skips a block that begins with NaN as if it were empty.  Infinity becomes NaN in the softmax.
        return torch.where(score.isnan(), float("inf"), score) if on_cpu else score

    def packed_mask_mod(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        i = rows.position(row)
        return (i >= birth[b, h, column]) & (i < death[b, h, column])

    return packed_score_mod, packed_mask_mod
