"""The gates' own loss: how well they predict the attention that a key gets later.

A divergence of predictions teaches gates little: its gradient reaches a gate only through keys that are seen, and through
logits, which gates that rank leave alone.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from flexdma.gates import ValueGate
from flexdma.integrations.transformers.calibration.calibrate import SCALE
from flexdma.integrations.transformers.future_peaks import FLOOR, sampled_keys


def ranking_loss(gate: Any, value: Tensor, peaks: Tensor, far: int) -> Tensor:
    """The divergence of exp(gate) from FLOOR + peak, each over its sum over keys; gates in units of A, without slope.

    It is the deviance of the log-linear regression of `calibrate`, with the intercept that makes the sums equal.
    gate: a ValueGate with recency None or "slope".  value: [B, Hkv, K, Dv], without gradient.  peaks: [B, Hkv, K].
    """
    keys = sampled_keys(value.shape[2], far)
    predicted = logarithms(gate, value)[..., keys]
    needed = peaks[..., keys].to(predicted.dtype) + FLOOR
    shares = needed / needed.sum(-1, keepdim=True)
    return kl_div(predicted.log_softmax(-1), shares, reduction="none").sum(-1).mean().float()


def logarithms(gate: Any, value: Tensor) -> Tensor:
    """[B, Hkv, K] float64: the gates of these values without their slope, divided by A."""
    gates = gate(value).double()
    if gate.recency == "slope":
        gates = gates - gate.slope.double()[:, None] * torch.arange(value.shape[2], device=value.device)
    return gates / gate.A.double()[:, None]


def start_constant_gates(gate: ValueGate) -> None:
    """Give heads with A = 0 a scale, with weights of 0, so that their gates stay constant and can learn."""
    with torch.no_grad():
        constant = gate.A == 0
        gate.A[constant] = SCALE
        gate.dt_proj.weight[constant] = 0.0
