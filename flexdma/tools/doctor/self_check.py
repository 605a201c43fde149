"""Check flexdma itself on this machine: compiled training and inference, compared with the definition."""

import dataclasses

import torch
from torch import Tensor

from flexdma.attention import dynamic_mask_attention
from flexdma.reference import dense_dynamic_mask_attention
from flexdma.tools.doctor.call import doctor
from flexdma.tools.doctor.report import PROBLEM, Diagnosis, Finding

LENGTH, WINDOW = 256, 32
# For float32 sums of 32 weights, with matrix products of Triton in lower precision (TF32).
TOLERANCE = 1e-2


def self_check(backend: str = "inductor") -> Diagnosis:
    """Run `doctor` on forward with backward, then on forward alone, and compare the result with the definition."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 4, LENGTH, 32), (1, 2, LENGTH, 32), (1, 2, LENGTH, 32), (1, 2, LENGTH))
    tensors = [torch.randn(shape, generator=generator).to(device) for shape in shapes]

    def attend(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        return dynamic_mask_attention(query, key, value, gate, window_size=WINDOW)

    trained = doctor(attend, tuple(tensor.clone().requires_grad_() for tensor in tensors), backend=backend)
    inferred = doctor(attend, tuple(tensors), backend=backend)
    with torch.no_grad():
        expected = dense_dynamic_mask_attention(*tensors, window_size=WINDOW)
        error = (torch.compile(attend, backend=backend)(*tensors) - expected).abs().max().item()
    found = list(dict.fromkeys(trained.findings + inferred.findings))
    if error > TOLERANCE:
        what = f"the operator's result differs from the definition by {error:.1e}"
        found.insert(
            0, Finding(PROBLEM, "error", what, "flexdma.dynamic_mask_attention", "report this with the versions")
        )
    return dataclasses.replace(
        trained,
        calls=trained.calls + inferred.calls,
        graphs=trained.graphs + inferred.graphs,
        recompilations=trained.recompilations + inferred.recompilations,
        findings=found,
    )
