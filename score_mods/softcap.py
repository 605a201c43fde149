"""Soft capping: logits are mapped into (-cap, cap).

Gemma 2, arXiv 2408.00118, section 2; Bello et al., arXiv 1611.09940.
"""

import torch
from torch import Tensor

from flexdma.signatures import ScoreMod


def softcap_score_mod(cap: float) -> ScoreMod:
    """Cap * tanh(score / cap).

    A Python number becomes a constant of the kernel, so another cap compiles again.  Raises ValueError unless cap > 0.
    """
    if not cap > 0:
        raise ValueError(f"cap: expected a number above 0, got {cap}")

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod
