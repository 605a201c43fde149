"""The attention that keys receive from real queries."""

import torch
from torch import Tensor

from flexdma.lifespans import Lifespans
from flexdma.mass import attention_mass


def observed_mass(
    query: Tensor, key: Tensor, lifespans: Lifespans, real_queries: Tensor | None, scale: float | None,
    lowering: str | None = None,
) -> Tensor:  # fmt: skip
    """`attention_mass` [B, Hkv, K], summed over the queries of real tokens.

    real_queries: [B, K] bool, True = real token, at the positions of query; the others attend to nothing.
    """
    if real_queries is None:
        return attention_mass(query, key, lifespans, scale=scale, lowering=lowering)

    def of_real_queries(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(real_queries[b, i], score, -torch.inf)

    return attention_mass(query, key, lifespans, scale=scale, score_mod=of_real_queries, lowering=lowering)
