"""Gates as differences: how a gate of any size reaches the logit without losing precision.

A number that depends on the query alone cancels in the softmax, so the logit may add  gate_j - reference_i  for any
reference.  With the query's own gate as reference the difference stays small where the gates grow with position
(recency), and a float64 gate keeps its low part in a second float32 number: the error at position 1,000,000 is the
error at position 1,000.
"""

import torch
from torch import Tensor


def reference_gate(gate: Tensor) -> Tensor:
    """The last finite gate at or before each position, 0 before the first one.  [B, H, K] -> [B, H, K], no gradient."""
    gate = gate.detach()
    positions = torch.arange(gate.shape[-1], device=gate.device)
    finite = gate.isfinite()
    last = torch.where(finite, positions, -1).cummax(-1).values
    return torch.where(last < 0, 0.0, gate.gather(-1, last.clamp(min=0)))


def split(gate: Tensor) -> tuple[Tensor, Tensor | None]:
    """float64 -> float32 high and low parts, high + low = gate to 48 bits; other dtypes -> (float32, None).

    The gradient flows through the high part alone.
    """
    high = gate.float()
    if gate.dtype != torch.float64:
        return high, None
    low = torch.where(high.isfinite(), gate.detach() - high.detach().double(), 0.0)
    return high, low.float()
