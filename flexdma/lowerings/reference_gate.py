"""Gates as differences, so that gates of any size keep their precision in the logit.

A number that depends on the query alone cancels in the softmax, so the logit may add  gate_j - reference_i  for any
reference.  The reference here is the largest gate that the query sees.  The rounding error of a key is then relative to its
distance from the best key, and is large only where its weight is small.  So neither gates that grow with position (recency)
nor an outlier cost the others precision.  The low part of a float64 gate is kept in a second float32 number.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexdma.lifespans import Lifespans
from flexdma.lifespans.visible import best_visible
from flexdma.lowerings.running_maximum import running_best, running_maximum
from flexdma.opaque import apart, opaque_on_cpu
from flexdma.stages import staged


def added_to_logits(gate: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """The sum of gate and bias, each [B, 1 or Hkv, K] or None, in float64 where one of them is, else in float32."""
    if gate is None or bias is None:
        return bias if gate is None else gate
    dtype = torch.float64 if torch.float64 in (gate.dtype, bias.dtype) else torch.float32
    return apart(gate.to(dtype) + bias.to(dtype))


def biases(
    key: Tensor,
    bias: Tensor | None,
    lifespans: Lifespans,
    queries: int,
    *,
    best_stays: bool,
    exact: bool,
    one_document: bool = False,
) -> tuple[Tensor, Tensor]:
    """The bias that each term adds, [B, Hkv, P K] in float32 or float64, and the reference, [B, Hkv, Q].

    key: [B, Hkv, K, D]; bias, lifespans: [B, 1 or Hkv, P K].  best_stays, exact: as in `visible_reference`.
    one_document: with best_stays and not exact the reference is then `largest_so_far`.
    """
    shape = (*key.shape[:2], lifespans.birth.shape[-1])
    if bias is None:
        zeros = torch.zeros((1, 1, 1), dtype=torch.float32, device=key.device)
        return zeros.expand(shape), zeros.expand(*shape[:2], queries)
    bias = (bias if bias.dtype == torch.float64 else bias.float()).expand(shape)
    if best_stays and one_document and not exact:
        return bias, largest_so_far(bias.detach(), lifespans)[..., bias.shape[-1] - queries :]
    return bias, visible_reference(bias, lifespans, queries, best_stays=best_stays, exact=exact)


@staged("reference gates")
def largest_so_far(bias: Tensor, lifespans: Lifespans) -> Tensor:
    """[B, H, K] float32, without a gradient: `reference_gate` of a single document, rounded.  One cumulative pass.

    A finite gate may have been evicted by an infinite one.  Then the logits are not finite by any reference.
    """
    rounded = bias.float()
    seen = rounded.isfinite() & (lifespans.death > lifespans.birth)
    largest = running_maximum(torch.where(seen, rounded, float("-inf")))
    return torch.where(largest == float("-inf"), 0.0, largest)


@staged("reference gates")
def visible_reference(bias: Tensor, lifespans: Lifespans, queries: int, *, best_stays: bool, exact: bool) -> Tensor:
    """[B, H, Q]: the largest finite bias that each of the last Q positions sees; 0 if it sees none.

    bias: [B, H, K].
    best_stays: the best key that a query sees stays visible to the end of its document, as in a selection by this bias.
        Three cumulative passes then find it.
    exact: False allows, with best_stays, any one of the biases that float32 rounds to the same number.
    The gradient flows to the bias.
    """
    if best_stays:
        return reference_gate(bias, lifespans, exact=exact)[..., bias.shape[-1] - queries :]
    birth, death = (bound.expand(bias.shape) for bound in lifespans)
    best = best_visible(bias.detach(), birth, death, queries)[0]
    return torch.where(best < 0, 0.0, bias.gather(-1, best.clamp(min=0)))


def reference_gate(gate: Tensor, lifespans: Lifespans, *, exact: bool = False) -> Tensor:
    """The largest finite gate of the keys at or before each position, in its document, that are ever visible; 0 for none.

    gate, birth, death: [B, H, K] -> [B, H, K]; of equal gates the newer one's, which matters for the gradient only.  Under a
    running top-w and under a threshold this is the largest gate that the query sees, because the first key in rank stays
    visible to the end of its document.  exact=False allows any one of the gates that float32 rounds to the same number.
    Three cumulative passes; five for exact float64 gates; two more on a GPU.
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
    # A document (or a run without keys) begins where no earlier key is alive.
    latest = running_maximum(torch.where(lives, death, 0))
    document = (pad(latest, (1, 0))[..., :-1] <= positions).cumsum(-1)

    # One pass for all documents: an int64 of the document's number and 32 bits that sort like the float32 gate.
    seen = torch.where(gate.isfinite() & lives, gate, float("-inf"))
    place = _ordered(seen) + document * 2**32
    largest, best = running_best(place)
    if twice:
        # The same again for the low parts of gates whose float32 values are equal.
        run = (pad(largest, (1, 0))[..., :-1] != largest).cumsum(-1)
        rest = torch.where((place == largest) & seen.isfinite(), seen - seen.float().double(), float("-inf"))
        best = running_best(_ordered(rest) + run * 2**32)[1]
    return [torch.where(seen.gather(-1, best) == float("-inf"), -1, best)]


def _ordered(number: Tensor) -> Tensor:
    """An int64 within 32 bits that sorts like the number in float32."""
    bits = (number.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0, so equal numbers have equal bits
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()


def split(gate: Tensor) -> tuple[Tensor, Tensor | None]:
    """float64 -> float32 high and low parts, high + low = gate to 48 bits; other dtypes -> (float32, None).

    The gradient flows through the high part only.
    """
    high = gate.float()
    if gate.dtype != torch.float64:
        return high, None
    low = torch.where(high.isfinite(), gate.detach() - high.detach().double(), 0.0)
    return high, low.float()
