"""What all causal policies do with the deaths that they compute: documents end lives, and padding has none."""

import torch
from torch import Tensor

from flexdma.lifespans import Lifespans
from flexdma.lifespans.selection import document_bounds
from flexdma.opaque import apart


def bounds(length: int, document_ids: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Start and end of each position's document, int64: [B, 1, K], or [1, 1, 1] without documents; on like's device."""
    if document_ids is not None:
        return document_bounds(document_ids)
    start = torch.zeros((1, 1, 1), dtype=torch.int64, device=like.device)
    return start, torch.full_like(start, length)


def within_documents(death: Tensor, key_padding_mask: Tensor | None, document_ids: Tensor | None) -> Lifespans:
    """Keys that are born at their own positions and die at death [B, H, K], at the latest with their documents.

    key_padding_mask, document_ids: [B, K], as in `causal_top_w`.
    """
    length = death.shape[-1]
    position = torch.arange(length, device=death.device)
    death = torch.minimum(death, bounds(length, document_ids, death)[1])
    if key_padding_mask is not None:
        death = torch.where(key_padding_mask[:, None], death, position)
    birth = position.to(torch.int32).expand(death.shape).contiguous()
    return Lifespans(apart(birth), apart(death.to(torch.int32).contiguous()))
