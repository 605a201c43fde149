"""Needles by length and depth, by a model that was trained at one length, and the memory that its keys and values take."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flexdma import DynamicMaskAttention, DynamicMaskLatentAttention
from flexdma.tools.experiments.model import SequenceModel
from flexdma.tools.experiments.tasks import IGNORED, Needles

BYTES = 4  # of a float32


@dataclass(frozen=True)
class HeatMap:
    """After training, all needles asked for at the end of sequences of `lengths`, one at a time for little memory.

    depths: parts of a sequence, from its first bytes to its last.  tokens: of all sequences of one length.
    """

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    depths: int = 8
    tokens: int = 65536

    @torch.no_grad()
    def measure(self, model: SequenceModel, task: Needles, *, is_last: bool) -> dict[str, Any]:
        """The accuracy [lengths][depths], None where nothing was asked, the accuracy at each length, and the memory there.

        kept: bytes of the keys and values that one layer keeps for a sequence of each length; None where the mixer is not
            one of this library, and its memory unknown.
        """
        if not is_last:
            return {}
        right = torch.zeros(len(self.lengths), self.depths, dtype=torch.float64)
        asked = torch.zeros_like(right)
        for row, length in enumerate(self.lengths):
            at_length = replace(task, length=length, at_end=True)
            batch = at_length.held_out(max(1, self.tokens // length))
            for symbols, targets, distance in zip(*batch, strict=True):
                found, depth = _answers(model, symbols, targets, distance, at_length.haystack, self.depths)
                right[row].index_add_(0, depth, found.double())
                asked[row].index_add_(0, depth, torch.ones_like(found, dtype=torch.float64))
        shares = [
            [number / of if of else None for number, of in zip(*pair, strict=True)]
            for pair in zip(right.tolist(), asked.tolist(), strict=True)
        ]
        return {
            "lengths": list(self.lengths),
            "accuracy": shares,
            "overall": (right.sum(-1) / asked.sum(-1)).tolist(),
            "questions": asked.sum(-1).long().tolist(),
            "kept": [kept_bytes(model, length) for length in self.lengths],
        }


def kept_bytes(model: nn.Module, length: int) -> int | None:
    """Bytes of the float32 keys and values that the first layer keeps for a sequence; None for layers of other libraries."""
    for layer in model.modules():
        if isinstance(layer, (DynamicMaskAttention, DynamicMaskLatentAttention)):
            kept = length if layer.policy.capacity is None else min(length, layer.policy.capacity)
            return kept * _numbers_per_key(layer) * BYTES
    return None


def _numbers_per_key(layer: DynamicMaskAttention | DynamicMaskLatentAttention) -> int:
    """Of the key and value of all heads, or of the latent and the rotated key that heads share."""
    if isinstance(layer, DynamicMaskLatentAttention):
        return layer.kv_lora_rank + layer.qk_rope_head_dim
    return layer.num_kv_heads * 2 * layer.head_dim


def _answers(
    model: SequenceModel, symbols: Tensor, targets: Tensor, distance: Tensor, haystack: int, depths: int
) -> tuple[Tensor, Tensor]:
    """Whether each question of one sequence is answered, and the depth of its answer, below `depths`."""
    device = next(model.parameters()).device
    asked = targets != IGNORED
    logits = model(symbols[None].to(device), asked[None].to(device)).cpu()
    position = asked.nonzero().flatten() - distance[asked]
    return logits.argmax(-1) == targets[asked], position * depths // haystack
