"""Plain attention of blocks of queries, each to the keys gathered for it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexdma.lowerings.hidden import HIDDEN
from flexdma.mixed_precision import without_autocast
from flexdma.signatures import ScoreMod, modified_scores
from flexdma.transforms import is_exporting


class Blocks(NamedTuple):
    """R blocks of M queries, and what is known of the C keys of each."""

    rows: Tensor  # [B, Hkv, R, G, M, D]
    bias: Tensor  # [B, Hkv, R, C]
    reference: Tensor  # [B, Hkv, R, M]: the number that each query subtracts from biases
    slots: Tensor  # [B, Hkv, R, C]: positions of the keys, the block's own M last
    death: Tensor  # [B, Hkv, R, C]
    positions: Tensor  # [1, 1, R, M]: of the queries

    def split(self, count: int) -> "list[Blocks]":
        """At most `count` blocks at a time."""
        return [Blocks(*chunk) for chunk in zip(*(each.split(count, 2) for each in self), strict=True)]


def attend_blocks(
    keys: Tensor,  # [B, Hkv, R, C, D]
    values: Tensor,  # [B, Hkv, R, C, Dv]
    blocks: Blocks,
    *,
    scale: float,
    score_mod: ScoreMod | None,
    log_sum: bool,
) -> list[Tensor]:
    """A list of the attention of each query block to its gathered keys, [B, Hkv, R, G, M, Dv].

    A row that sees no key gives 0.
    log_sum: also return the log-sum-exp of each row's scores, [B, Hkv, R, G, M]; arbitrary for a row that sees no key.
    """
    rows, bias, reference, slots, death, positions = blocks
    group, block = rows.shape[3:5]
    computed = torch.float64 if rows.dtype == torch.float64 else torch.float32
    # Keys other than the block's own are born before the block.
    born = pad(
        torch.ones(block, block, dtype=torch.bool, device=rows.device).tril(), (death.shape[-1] - block, 0), value=True
    )
    visible = (positions[..., None] < death.unsqueeze(-2)) & born  # [B, Hkv, R, M, C]
    # Row i sees a key iff the latest death among keys born by i is after i.  This avoids a reduction of `visible`.
    latest = torch.maximum(death[..., :-block].amax(-1, keepdim=True), death[..., -block:].cummax(-1).values)
    nothing = (latest <= positions)[:, :, :, None, :, None]
    difference = (bias.unsqueeze(-2) - reference.unsqueeze(-1)).to(computed)
    added = torch.where(visible, difference, HIDDEN).unsqueeze(3)  # [B, Hkv, R, 1, M, C]

    with without_autocast(rows.device):
        flat = rows.flatten(3, 4).to(computed) * scale
        scores = _product(flat, keys.to(computed).mT).unflatten(3, (group, block))  # [B, Hkv, R, G, M, C]
        if score_mod is None:
            scores = scores + added
        else:
            scores = _modified(scores, positions, slots, score_mod) + added
            nothing = nothing | (scores.detach().amax(-1, keepdim=True) <= HIDDEN / 2)
            scores = scores.masked_fill(nothing, 0.0)
        output = _product(scores.softmax(-1).flatten(3, 4), values.to(computed)).unflatten(3, (group, block))
    output = torch.where(nothing, 0.0, output).to(rows.dtype)
    return [output, scores.logsumexp(-1)] if log_sum else [output]


def joined(tensor: Tensor) -> Tensor:
    """[B, Hkv, R, ...] -> [B Hkv R, ...] for torch.export, which cannot prove that `flatten` may join a symbolic R."""
    # Through one row: these two steps need no proof.
    row = tensor.clone(memory_format=torch.contiguous_format).flatten()
    return row.view(math.prod(tensor.shape[:3]), math.prod(tensor.shape[3:])).unflatten(1, tensor.shape[3:])


def parted(tensor: Tensor, leading: torch.Size) -> Tensor:
    """The inverse of `joined`, for leading = [B, Hkv, R]."""
    batch, *others = (*leading, *tensor.shape[1:])
    row = tensor.clone(memory_format=torch.contiguous_format).flatten()
    return row.view(batch, math.prod(others)).unflatten(1, others)


def _product(first: Tensor, second: Tensor) -> Tensor:
    """The matrix product of tensors, both [B, Hkv, R, ...]."""
    if not is_exporting():
        return first @ second
    return parted(joined(first) @ joined(second), first.shape[:3])


def _modified(scores: Tensor, positions: Tensor, slots: Tensor, score_mod: ScoreMod) -> Tensor:
    """score_mod on whole tiles, with index tensors that broadcast to [B, Hkv, R, G, M, C]."""
    batch, heads, _, group = scores.shape[:4]

    def index(count: int, dim: int) -> Tensor:
        return torch.arange(count, device=scores.device).view([-1 if d == dim else 1 for d in range(6)])

    head = index(heads, 1) * group + index(group, 3)
    return modified_scores(
        score_mod, scores, index(batch, 0), head, positions[:, :, :, None, :, None], slots[:, :, :, None, None]
    )
