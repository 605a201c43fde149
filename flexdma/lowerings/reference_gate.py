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
from flexdma.lifespans.visible import best_visible
from flexdma.opaque import opaque_on_cpu
from flexdma.stages import staged


def biases(
    key: Tensor, bias: Tensor | None, lifespans: Lifespans, queries: int, *, ranked: bool, exact: bool
) -> tuple[Tensor, Tensor]:
    """What each key of [B, Hkv, K, D] adds, [B, Hkv, K] of at least float32, and what queries subtract, [B, Hkv, Q]."""
    shape = key.shape[:3]
    if bias is None:
        zeros = torch.zeros((1, 1, 1), dtype=torch.float32, device=key.device)
        return zeros.expand(shape), zeros.expand(*shape[:2], queries)
    bias = (bias if bias.dtype == torch.float64 else bias.float()).expand(shape)
    return bias, visible_reference(bias, lifespans, queries, ranked=ranked, exact=exact)


@staged("reference gates")
def visible_reference(bias: Tensor, lifespans: Lifespans, queries: int, *, ranked: bool, exact: bool) -> Tensor:
    """[B, H, Q] that cancels in the softmax: near the largest finite bias that each of the last Q positions sees.

    bias: [B, H, K].  ranked: the best key that a query sees leaves only with its document, as in a selection by this bias;
        three cumulative passes then find it.
    exact: that bias itself, with its gradient; otherwise, of ranked ones that float32 rounds to the same number, any.
    """
    if ranked:
        return reference_gate(bias, lifespans, exact=exact)[..., bias.shape[-1] - queries :]
    birth, death = (bound.expand(bias.shape) for bound in lifespans)
    best = best_visible(bias.detach(), birth, death, queries)[0]
    return torch.where(best < 0, 0.0, bias.gather(-1, best.clamp(min=0)))


def reference_gate(gate: Tensor, lifespans: Lifespans, *, exact: bool = False) -> Tensor:
    """The largest finite gate among the keys that live up to each position, in its own document; 0 before the first.

    gate, birth, death: [B, H, K] -> [B, H, K]; of equal gates the newer one's, which matters for the gradient alone.  Under a
    running top-w, and for keys above a threshold, that is the largest gate the query sees: the first in rank leaves only with
    its document.  Of gates that float32 rounds to the same number it may be any, unless exact.
    Three cumulative passes; five for exact ones in float64.
    """
    birth, death = (bound.expand(gate.shape) for bound in lifespans)
    best = _best_so_far(gate.detach(), birth, death, exact and gate.dtype == torch.float64)[0]
    return torch.where(best < 0, 0.0, gate.gather(-1, best.clamp(min=0)))


def _empty_index(gate: Tensor, birth: Tensor, death: Tensor, twice: bool) -> list[Tensor]:
    return [torch.empty(gate.shape, dtype=torch.int64, device=gate.device)]


@opaque_on_cpu("best_so_far", _empty_index)
def _best_so_far(gate: Tensor, birth: Tensor, death: Tensor, twice: bool) -> list[Tensor]:
    positions = torch.arange(gate.shape[-1], device=gate.device)
    lives = death > birth
    # No earlier key lives on at s: a document, or a row without keys, begins.
    latest = torch.where(lives, death, 0).cummax(-1).values
    document = (pad(latest[..., :-1], (1, 0)) <= positions).cumsum(-1)

    # One maximum for all documents: an int64 of the document's number and 32 bits that order as the float32 gate does.
    seen = torch.where(gate.isfinite() & lives, gate, float("-inf"))
    place = _ordered(seen) + document * 2**32
    largest, best = place.cummax(-1)
    if twice:
        # Among those that float32 cannot tell apart, the same once more with what it leaves over.
        run = (pad(largest[..., :-1], (1, 0)) != largest).cumsum(-1)
        rest = torch.where((place == largest) & seen.isfinite(), seen - seen.float().double(), float("-inf"))
        best = (_ordered(rest) + run * 2**32).cummax(-1).indices
    return [torch.where(seen.gather(-1, best) == float("-inf"), -1, best)]


def _ordered(number: Tensor) -> Tensor:
    """An int64 within 32 bits that orders as the number does in float32."""
    bits = number.float().view(torch.int32)
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()


def split(gate: Tensor) -> tuple[Tensor, Tensor | None]:
    """float64 -> float32 high and low parts, high + low = gate to 48 bits; other dtypes -> (float32, None).

    The gradient flows through the high part alone.
    """
    high = gate.float()
    if gate.dtype != torch.float64:
        return high, None
    low = torch.where(high.isfinite(), gate.detach() - high.detach().double(), 0.0)
    return high, low.float()
