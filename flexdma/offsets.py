"""Gates as differences: how a gate of any size reaches the logit without losing precision.

A number that depends on the query alone cancels in the softmax, so the logit may add  gate_j - reference_i  for any
reference.  With the largest gate that the query sees as reference a rounding error is relative to how far a key is
behind, and falls on weights that are small already: neither a position of a million (recency) nor an outlier costs the
others anything.  A float64 gate keeps its low part in a second float32 number.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexdma.lifespans import Lifespans
from flexdma.opaque import opaque_on_cpu


def reference_gate(gate: Tensor, lifespans: Lifespans) -> Tensor:
    """The largest finite gate among the keys that live up to each position, in its own document; 0 before the first.

    gate, birth, death: [B, H, K] -> [B, H, K], no gradient.  Under a running top-w, and for keys above a threshold, that is
    the largest gate the query sees: the first in rank leaves only with its document.  ceil(log2 K) elementwise rounds.
    """
    return _largest_so_far(gate.detach(), *(bound.expand(gate.shape) for bound in lifespans))[0]


def _empty_gate(gate: Tensor, birth: Tensor, death: Tensor) -> list[Tensor]:
    return [torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)]


@opaque_on_cpu("largest_so_far", _empty_gate)
def _largest_so_far(gate: Tensor, birth: Tensor, death: Tensor) -> list[Tensor]:
    length = gate.shape[-1]
    positions = torch.arange(length, device=gate.device)
    birth, death = birth.long(), death.long()
    # How many keys live across the step from s - 1 to s.  None: a document, or a row without keys, begins at s.
    crosses = (death > birth + 1).int()
    steps = torch.zeros(*birth.shape[:-1], length + 1, dtype=torch.int32, device=gate.device)
    steps.scatter_add_(-1, (birth + 1).clamp(max=length), crosses).scatter_add_(-1, death, -crosses)
    begins = steps.cumsum(-1)[..., :length] == 0
    start = torch.where(begins, positions, 0).cummax(-1).values

    largest = torch.where(gate.isfinite() & (death > birth), gate, float("-inf"))
    shift = 1
    while shift < length:
        earlier = pad(largest[..., :-shift], (shift, 0), value=float("-inf"))
        largest = torch.where(positions - shift >= start, torch.maximum(largest, earlier), largest)
        shift *= 2
    return [torch.where(largest == float("-inf"), 0.0, largest)]


def split(gate: Tensor) -> tuple[Tensor, Tensor | None]:
    """float64 -> float32 high and low parts, high + low = gate to 48 bits; other dtypes -> (float32, None).

    The gradient flows through the high part alone.
    """
    high = gate.float()
    if gate.dtype != torch.float64:
        return high, None
    low = torch.where(high.isfinite(), gate.detach() - high.detach().double(), 0.0)
    return high, low.float()
