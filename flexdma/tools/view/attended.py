"""Full attention of one layer, and for each query the keys that it attends to most.

A block of queries is computed at a time, so no matrix of queries by keys exists for all of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flexdma.lifespans import Lifespans

TOP = 16  # keys of each query
BLOCK = 128  # queries computed at once


class Attended(NamedTuple):
    """The attention of one layer, for each KV head the mean over its query heads.

    keys, probabilities: [Hkv, N, min(TOP, N)], the largest of each query, in falling order.  Probabilities of all keys sum to
        1, or to less where a learned sink has its part of the softmax.
    on_kept: [Hkv, N], the part of the attention to keys that is on kept keys.
    mean_on_kept: [Hkv], its mean over the queries that lack a key; 1 where there are none.
    """

    keys: Tensor
    probabilities: Tensor
    on_kept: Tensor
    mean_on_kept: Tensor


def attend_and_note(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    kept: Lifespans,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Attended]:
    """Attention [1, Hq, N, Dv] in float32, and what it attends to.

    query [1, Hq, N, D], key [1, Hkv, N, D], value [1, Hkv, N, Dv].
    mask: [1, 1, N, N], bool or added to the logits.  kept: [1, Hkv, N], the keys that another model keeps.
    scale: None = 1 / sqrt(D).  softcap: c tanh(logit / c).  sink_logits: [Hq].
    Memory: probabilities of BLOCK queries.
    """
    heads, length = key.shape[1], key.shape[2]
    # [Hkv, G, N, D], [Hkv, 1, D, N], [Hkv, 1, N, Dv]
    grouped, keys, values = (
        query[0].unflatten(0, (heads, -1)).float(),
        key[0, :, None].float().mT,
        value[0, :, None].float(),
    )
    outputs, parts = [], []
    for start in range(0, length, BLOCK):
        rows = slice(start, start + BLOCK)
        logits = grouped[:, :, rows] @ keys * (query.shape[-1] ** -0.5 if scale is None else scale)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        allowed = mask[0, 0, rows]
        logits = (
            logits.masked_fill(~allowed, float("-inf")) if allowed.dtype == torch.bool else logits + allowed.float()
        )
        if sink_logits is not None:
            sink = sink_logits.float().view(heads, -1, 1, 1).expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sink], -1)
        weights = logits.softmax(-1)[..., :length]
        outputs.append(weights @ values)
        parts.append(_note(weights.mean(1), kept, torch.arange(start, start + weights.shape[2], device=key.device)))
    output = torch.cat(outputs, 2).flatten(0, 1)[None]
    top_keys, probabilities, on_kept, lacking = (torch.cat(part, 1) for part in zip(*parts, strict=True))
    mean = (on_kept * lacking).sum(-1) / lacking.sum(-1)
    return output, Attended(top_keys, probabilities, on_kept, torch.where(lacking.any(-1), mean, 1.0))


def _note(weights: Tensor, kept: Lifespans, queries: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """keys, probabilities and on_kept of a block of weights [Hkv, n, N], and whether each query lacks a key: [Hkv, n]."""
    alive = (kept.birth[0, :, None] <= queries[:, None]) & (queries[:, None] < kept.death[0, :, None])
    probabilities, keys = weights.topk(min(TOP, weights.shape[-1]), -1)
    on_kept = (weights * alive).sum(-1) / weights.sum(-1)
    return keys, probabilities, on_kept, alive.sum(-1) < queries + 1
