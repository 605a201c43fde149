"""TRIM-KV (arXiv 2512.03324): learned retention scores that decay, and a budget of keys.

At step t the score of key j is beta_j ** (t - j).  Curves cross, so no order of keys gives their deaths: a key may die to one
that would have died first later.  The scan follows the living keys, whose number is bounded.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flexdma import checks
from flexdma.lifespans import Lifespans
from flexdma.lifespans.selection import on_device
from flexdma.opaque import opaque
from flexdma.policies.living_keys import no_keys
from flexdma.policies.within_documents import bounds, within_documents


def trim_kv_lifespans(
    log_beta: Tensor,
    capacity: int | Sequence[int],
    *,
    chunk: int = 1,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Lifespans:
    """While more than `capacity` keys live, the one with the smallest (t - j) log beta_j dies, before query t attends.

    log_beta: [B, H, K], any float dtype: logarithms of the retention scores, at most 0; products are float64, which is exact
        for float32 and narrower.  -inf (beta = 0) scores 0 from the step after its own on.  NaN ranks highest.
    capacity: M, one int, or H ints.
    chunk: keys die at every chunk-th position.  1 is the paper's rule; more saves steps, as the buffer of the authors' code
        does, and a query sees up to M + chunk - 1 keys.
    key_padding_mask, document_ids: as in `causal_top_w`.  A masked token is no step, and each document has its own budget.

    Of equal scores the older key dies; a key's score at its own step is 1, the largest.

        beta = [.9, .6, .8, .5], capacity = 2       query 0: 0
                                                    query 1: 0 1
            birth = [0 1 2 3]                       query 2: 0   2      .9^2 = .81, .6
            death = [3 2 4 4]                       query 3:     2 3    .9^3 = .73, .8

    Returns Lifespans [B, H, K].
    Raises ValueError or TypeError naming the argument.  K / chunk steps, each a sort of capacity + chunk keys; O(K) memory
    besides.  torch.compile calls it as one operator; torch.export is refused.
    """
    checks.selected_keys(log_beta, key_padding_mask, document_ids, "log_beta")
    checks.positive_int("chunk", chunk)
    budget = checks.per_head("capacity", capacity, log_beta.shape[1])
    (death,) = _deaths(log_beta.detach(), budget, chunk, key_padding_mask, document_ids)
    return within_documents(death, key_padding_mask, document_ids)


def _empty_deaths(log_beta: Tensor, *_others: object) -> list[Tensor]:
    return [torch.empty(log_beta.shape, dtype=torch.int64, device=log_beta.device)]


@opaque("trim_kv_deaths", _empty_deaths)
def _deaths(
    log_beta: Tensor, budget: list[int], chunk: int, key_padding_mask: Tensor | None, document_ids: Tensor | None
) -> list[Tensor]:
    keys = log_beta.shape[-1]
    log_beta = log_beta.double()
    position = torch.arange(keys, device=log_beta.device)
    start = bounds(keys, document_ids, log_beta)[0].expand(-1, -1, keys)
    real = torch.ones_like(start, dtype=torch.bool) if key_padding_mask is None else key_padding_mask[:, None]
    step = real.cumsum(-1).expand(log_beta.shape[0], 1, keys)
    death = torch.full(log_beta.shape, keys, dtype=torch.int64, device=log_beta.device)
    places = on_device(budget, log_beta.device)
    alive, before = no_keys(log_beta), 0
    # No key dies before the first head has more than its budget.
    for t in (t for t in range(chunk - 1, keys, chunk) if t >= min(budget)):
        new = slice(before, t + 1)
        alive = alive.followed_by(position[new], real[..., new], log_beta[..., new])
        alive = alive._replace(living=alive.living & (alive.position >= start[..., t, None]))
        age = step[..., t, None] - step.expand_as(death).gather(-1, alive.position)
        score = torch.where((age == 0) & ~alive.number.isnan(), 0.0, age * alive.number)
        kept = alive.keeping(score, alive.living, places)
        dies = alive.living & ~kept
        # In place: no tracer sees it, and a copy for each step would make the time quadratic in K.
        death.scatter_reduce_(-1, alive.position, torch.where(dies, t, keys), "amin")
        alive, before = alive.only(kept, max(budget)), t + 1
    return [death]
