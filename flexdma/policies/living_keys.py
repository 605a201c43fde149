"""The living keys of a scan over chunks of positions, in order of position; a key that leaves never comes back."""

from typing import NamedTuple

import torch
from torch import Tensor

from flexdma.lifespans.order_statistics import scattered
from flexdma.lifespans.ranking import by_rank


class LivingKeys(NamedTuple):
    """Places of keys.

    position: [B, H, S] int64, increasing among living keys.  living: [B, H, S] bool; a place may have no key.
    number: [B, H, S], a number of each key that the policy keeps.
    """

    position: Tensor
    living: Tensor
    number: Tensor

    def followed_by(self, position: Tensor, living: Tensor, number: Tensor) -> "LivingKeys":
        """These keys, then newer ones; position [n], living [B, 1 or H, n], number [B, H, n]."""
        newer = (position.expand_as(number), living.expand_as(number), number)
        return LivingKeys(*(torch.cat(pair, -1) for pair in zip(self, newer, strict=True)))

    def keeping(self, score: Tensor, candidates: Tensor, budget: Tensor) -> Tensor:
        """[B, H, S] bool: the living keys that are no candidates, and the `budget` [H, 1] best candidates.

        Of equal scores the newer key; NaN ranks highest.
        """
        candidates = candidates & self.living
        lowest = torch.finfo(score.dtype).min  # above -inf, so that places without a candidate rank last
        ranked = by_rank(torch.where(candidates, torch.where(score == -torch.inf, lowest, score), -torch.inf))
        place = torch.arange(ranked.shape[-1], dtype=torch.int32, device=ranked.device)
        return self.living & (~candidates | (scattered(place.expand_as(ranked), ranked) < budget))

    def only(self, kept: Tensor, places: int) -> "LivingKeys":
        """The kept keys [B, H, S], at most `places` of each head, in as many places."""
        chosen = (~kept).to(torch.int8).sort(dim=-1, stable=True).indices[..., :places]
        return LivingKeys(*(field.gather(-1, chosen) for field in (self.position, kept, self.number)))


def no_keys(like: Tensor) -> LivingKeys:
    """No places; the numbers have the dtype of like [B, H, ...]."""
    empty = like.new_empty(*like.shape[:2], 0)
    return LivingKeys(empty.long(), empty.bool(), empty)
