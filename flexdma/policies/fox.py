"""The Forgetting Transformer with adaptive computation pruning (FoX, arXiv 2503.02130; ACP, arXiv 2504.06949).

FoX adds D_ij = sum of log f_t over j < t <= i to the logit of key j for query i.  D only falls with i, so the pairs with
D_ij < delta are the end of a key's life.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor

from flexdma import checks
from flexdma.lifespans import Lifespans
from flexdma.opaque import opaque_on_cpu
from flexdma.policies.within_documents import within_documents
from flexdma.transforms import can_read

Delta = TypeVar("Delta", float, Tensor)


def fox_delta(logit_bound: Delta, length: int, tolerance: float = math.exp(-10)) -> Delta:
    """-2 U - log L + log epsilon: pruning below it loses less than `tolerance` of any query's attention.

    logit_bound: U, a number or a tensor: a bound on |q k scale|, as scale times the largest norms of queries and keys.
        Numbers besides D that are added to logits count too.
    length: L, the most keys that one query sees.
    tolerance: epsilon, in (0, 1].  The default is the paper's.

    Returns delta in the form of logit_bound.  A proof is in docs/systems/lifespans.md.
    Raises ValueError or TypeError naming the argument.
    """
    checks.positive_int("length", length)
    if not 0 < tolerance <= 1:
        raise ValueError(f"tolerance: expected a number above 0, at most 1, got {tolerance!r}")
    return -2 * logit_bound - math.log(length) + math.log(tolerance)


def fox_lifespans(
    log_forget: Tensor,
    delta: float | Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Lifespans:
    """A key dies at the first query i with D_ij < delta.

    log_forget: [B, H, K], any float dtype: the logarithms of the forget gates, at most 0; summed in float64.  At -inf
        all earlier keys die, at any delta.  After a NaN no earlier key dies, so that the NaN reaches the output.
    delta: a number of at most 0 or floats [B, H]; `fox_delta` computes it.
    key_padding_mask, document_ids: as in `causal_top_w`; a masked token adds nothing to D.

        log_forget = [-1, -1, -4, -1], delta = -5   query 0: 0
                                                    query 1: 0 1
            birth = [0 1 2 3]                       query 2: 0 1 2      D_20 = -5 is not below
            death = [3 4 4 4]                       query 3:   1 2 3    D_30 = -6

    Returns Lifespans [B, H, K].  The number of keys that a query sees is not bounded.
    The keys still need D as a bias: -cumsum(log_forget) of each key in float64 (a number of the query cancels).
    Raises ValueError or TypeError naming the argument; log_forget above 0 on a CPU outside of torch.compile (elsewhere the
    results are wrong).  O(K log K): one binary search per key.
    """
    checks.selected_keys(log_forget, key_padding_mask, document_ids, "log_forget")
    batch, heads, _ = log_forget.shape
    log_forget = log_forget.detach()
    if key_padding_mask is not None:
        log_forget = log_forget.masked_fill(~key_padding_mask[:, None], 0.0)
    if isinstance(delta, Tensor):
        checks.floating("delta", checks.tensor("delta", delta, (batch, heads), log_forget))
        delta = delta.detach().double()
    elif isinstance(delta, bool) or not isinstance(delta, int | float):
        raise TypeError(f"delta: expected a number or a tensor [{batch}, {heads}], got {type(delta).__name__}")
    elif not delta <= 0:
        raise ValueError(f"delta: expected at most 0, got {delta}")
    else:
        delta = torch.full((batch, heads), delta, dtype=torch.float64, device=log_forget.device)
    if log_forget.device.type == "cpu" and can_read(log_forget) and bool((log_forget > 0).any()):
        raise ValueError(f"log_forget: expected numbers of at most 0, got {log_forget.max().item()}")
    (death,) = _deaths(log_forget, delta)
    return within_documents(death, key_padding_mask, document_ids)


def _empty_deaths(log_forget: Tensor, *_others: object) -> list[Tensor]:
    return [torch.empty(log_forget.shape, dtype=torch.int64, device=log_forget.device)]


@opaque_on_cpu("fox_deaths", _empty_deaths)
def _deaths(log_forget: Tensor, delta: Tensor) -> list[Tensor]:
    """[B, H, K] int64; K = no death.  Documents only cut lives short, so a sum over the whole row serves all of them."""
    keys = log_forget.shape[-1]
    decay = -log_forget.double()
    total = torch.where(decay.isfinite(), decay, 0.0).cumsum(-1).contiguous()
    below = torch.searchsorted(total, total - delta[..., None], right=True)
    below = torch.minimum(below, _next(decay == torch.inf))
    return [torch.where(below < _next(decay.isnan()), below, keys)]


def _next(marked: Tensor) -> Tensor:
    """[B, H, K] int64: the next marked position after each one; K for none."""
    keys = marked.shape[-1]
    position = torch.arange(keys, device=marked.device)
    at = torch.where(marked, position, keys).flip(-1).cummin(-1).values.flip(-1)
    return torch.nn.functional.pad(at[..., 1:], (0, 1), value=keys)
