"""H2O, Heavy-Hitter Oracle (arXiv 2306.14048): the keys that have received most attention so far, and the recent ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flexdma import checks
from flexdma.lifespans import Lifespans
from flexdma.lifespans.selection import on_device
from flexdma.opaque import opaque
from flexdma.policies.living_keys import LivingKeys, no_keys
from flexdma.policies.observed_mass import observed_mass
from flexdma.policies.within_documents import bounds, within_documents


def h2o_lifespans(
    query: Tensor,
    key: Tensor,
    heavy: int | Sequence[int],
    recent: int | Sequence[int],
    *,
    chunk: int = 1,
    prompt_length: int = 0,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Lifespans:
    """Before a chunk of queries, the keys that are no longer recent compete for `heavy` places; the losers die.

    A key's score is the attention that it has received from all queries so far, each over the keys that it sees.

    query: [B, Hq, K, D], of all positions; key: [B, Hkv, K, D].  The query heads of a KV head are added.
    heavy: places for heavy hitters, one int, or Hkv ints.
    recent: the last keys, the first query of a chunk included, which do not compete; one int, or Hkv ints.
    chunk: queries between evictions.  1 is the paper's rule, a query then sees at most heavy + recent keys; with more a query
        sees up to heavy + recent + chunk - 1, and there are as many fewer steps.
    prompt_length: the first queries, which attend to all of the prompt, and are one chunk.
    scale: of the logits; None = 1 / sqrt(D).
    key_padding_mask, document_ids: as in `causal_top_w`.  Padded queries give no attention.  Chunks are of positions of the
        row, so with chunk = 1 and no prompt a document is as alone.

    Of equal scores the newer key stays; NaN ranks highest.

    Returns Lifespans [B, Hkv, K].
    Raises ValueError or TypeError naming the argument.  K / chunk steps, each the attention of a chunk to heavy + recent +
    chunk keys; O(K + (heavy + recent + chunk) D) memory, O(prompt_length) more for a prompt.  torch.compile calls it as
    one operator; torch.export is refused.
    """
    batch, _, keys, _ = checks.tensor("query", query, ("B", "Hq", "K", "D")).shape
    checks.attention_arguments(query, key, key)
    if key.shape[2] != keys:
        raise ValueError(f"query: expected all K = {key.shape[2]} positions, got {keys}")
    checks.positive_int("chunk", chunk)
    checks.positive_int("prompt_length", prompt_length, 0)
    checks.scores(scale, None)
    places, window = (checks.per_head(n, size, key.shape[1]) for n, size in (("heavy", heavy), ("recent", recent)))
    checks.masks(batch, keys, key, key_padding_mask, document_ids)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    (death,) = _deaths(
        query.detach(), key.detach(), places, window, chunk, prompt_length, scale, key_padding_mask, document_ids
    )
    return within_documents(death, key_padding_mask, document_ids)


def _empty_deaths(query: Tensor, key: Tensor, *_others: object) -> list[Tensor]:
    return [torch.empty(key.shape[:3], dtype=torch.int64, device=key.device)]


@opaque("h2o_deaths", _empty_deaths)
def _deaths(
    query: Tensor, key: Tensor, heavy: list[int], recent: list[int], chunk: int, prompt_length: int, scale: float,
    key_padding_mask: Tensor | None, document_ids: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    batch, heads, keys, _ = key.shape
    position = torch.arange(keys, device=key.device)
    start, end = (bound.expand(batch, heads, keys) for bound in bounds(keys, document_ids, key))
    real = torch.ones_like(start, dtype=torch.bool)
    if key_padding_mask is not None:
        real = real & key_padding_mask[:, None]
    budget, window = (on_device(sizes, key.device) for sizes in (heavy, recent))
    death = torch.full((batch, heads, keys), keys, dtype=torch.int64, device=key.device)
    alive = no_keys(key[..., 0].to(torch.promote_types(key.dtype, torch.float32)))
    first = min(prompt_length, keys) or min(chunk, keys)
    for begin, stop in [(0, first)] + [(e, min(e + chunk, keys)) for e in range(first, keys, chunk)]:
        if begin:
            alive = alive._replace(living=alive.living & (alive.position >= start[..., begin, None]))
            kept = alive.keeping(alive.number, alive.position <= begin - window, budget)
            # In place: no tracer sees it, and a copy for each step would make the time quadratic in K.
            death.scatter_reduce_(-1, alive.position, torch.where(alive.living & ~kept, begin, keys), "amin")
            alive = alive.only(kept, max(heavy) + max(recent) - 1)
        chosen = slice(begin, stop)
        alive = alive.followed_by(
            position[chosen], real[..., chosen], alive.number.new_zeros(batch, heads, stop - begin)
        )
        received = _received(query[:, :, chosen], key, alive, end, begin, scale, key_padding_mask)
        alive = alive._replace(number=alive.number + received)
    return [death]


def _received(
    query: Tensor, key: Tensor, alive: LivingKeys, end: Tensor, begin: int, scale: float, mask: Tensor | None
) -> Tensor:
    """[B, H, S]: the attention that living keys get from a chunk of queries, whose own keys are the last ones.

    Places are positions here: those of older keys come first, and the query at position i is at i - begin + older.
    """
    places, queries = alive.position.shape[-1], query.shape[2]
    older = places - queries
    place = torch.arange(places, device=key.device)
    birth = torch.where(place < older, 0, place)
    death = torch.where(alive.living, (end.gather(-1, alive.position) - begin + older).clamp(max=places), birth)
    there = alive.position[..., None].expand(-1, -1, -1, key.shape[-1])
    real = None
    if mask is not None:
        real = torch.nn.functional.pad(mask[:, begin : begin + queries], (older, 0), value=True)
    lifespans = Lifespans(*(bound.expand_as(death).to(torch.int32) for bound in (birth, death)))
    return observed_mass(query, key.gather(2, there), lifespans, real, scale, "gather")
