"""Pages of a key/value cache: what bounds their keys, and attention of one token to picked pages."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexdma import checks
from flexdma.rounding import ceil_div


class PageBounds(NamedTuple):
    """The smallest and largest number of each channel over the keys of a page.

    least, most: [B, Hkv, pages, D], 0 in pages without a real key.
    real: [B, pages], whether a page has a real key.
    """

    least: Tensor
    most: Tensor
    real: Tensor

    def scores(self, query: Tensor) -> Tensor:
        """[B, Hq, pages]: no key of a page has a larger product with query [B, Hq, 1, D]; -inf without a real key."""
        heads = self.least.shape[1]
        rows = query.unflatten(1, (heads, -1)).flatten(2, 3)  # [B, Hkv, G, D]
        scores = rows.clamp(min=0) @ self.most.mT + rows.clamp(max=0) @ self.least.mT
        return scores.flatten(1, 2).masked_fill(~self.real[:, None], float("-inf"))


def page_bounds(key: Tensor, page_size: int, key_padding_mask: Tensor | None = None) -> PageBounds:
    """The bounds of every page of a cache.

    key: [B, Hkv, K, D].  page_size: keys of a page; the last page may be shorter.
    key_padding_mask: [B, K], True for real keys; others bound nothing.
    O(K D) time.  Full pages do not change, so a server keeps their bounds.
    """
    checks.tensor("key", key, ("B", "Hkv", "K", "D"))
    checks.positive_int("page_size", page_size)
    real = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    if key_padding_mask is not None:
        checks.padding_mask(key_padding_mask, key.shape[0], key.shape[2], key)
        real = key_padding_mask
    beyond = -key.shape[2] % page_size
    hidden = ~pad(real, (0, beyond)).unflatten(1, (-1, page_size))
    pages = pad(key, (0, 0, 0, beyond)).unflatten(2, (-1, page_size))
    empty = hidden.all(-1)
    bounds = [
        pages.masked_fill(hidden[:, None, :, :, None], end).amin(3) if end > 0 else
        pages.masked_fill(hidden[:, None, :, :, None], end).amax(3)
        for end in (float("inf"), float("-inf"))
    ]  # fmt: skip
    least, most = (bound.masked_fill(empty[:, None, :, None], 0.0) for bound in bounds)
    return PageBounds(least, most, ~empty)


def best_pages(scores: Tensor, number: int, last: Tensor) -> Tensor:
    """The `number` best pages, [B, Hq, min(number, pages)], the page of the newest key among them.

    scores: [B, Hq, pages]; pages of -inf may fill the list.  last: [B], the page of the newest key.
    """
    checks.positive_int("num_pages", number)
    newest = torch.arange(scores.shape[-1], device=scores.device) == last[:, None, None]
    return scores.masked_fill(newest, float("inf")).topk(min(number, scores.shape[-1]), dim=-1).indices


def attend_to_pages(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    *,
    page_size: int,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Attention of one token to the keys of its pages.

    query: [B, Hq, 1, D].  key: [B, Hkv, K, D].  value: [B, Hkv, K, Dv].
    pages: [B, Hq, P], int64, different pages.  page_size: keys of a page; 1 picks single keys.
    scale: None = D ** -0.5.  key_padding_mask: [B, K], True for real keys.
    Returns [B, Hq, 1, Dv]; 0 where no picked key is real.
    O(P page_size (D + Dv)) time and memory per query head, for any K.
    Raises ValueError or TypeError naming the argument.
    """
    one_token(query, key, value, key_padding_mask)
    checks.positive_int("page_size", page_size)
    (batch, query_heads, _one, size), (heads, keys) = query.shape, key.shape[1:3]
    checks.tensor("pages", pages, (batch, query_heads, "P"), query)
    positions = (pages[..., None] * page_size + torch.arange(page_size, device=pages.device)).flatten(2)
    visible = positions < keys
    positions = positions.clamp(max=keys - 1)
    if key_padding_mask is not None:
        visible = visible & key_padding_mask[:, None].expand(-1, query_heads, -1).gather(-1, positions)
    group = query_heads // heads
    picked = positions.unflatten(1, (heads, group)).flatten(2)  # [B, Hkv, G P page_size]

    def rows(tensor: Tensor) -> Tensor:
        taken = tensor.gather(2, picked[..., None].expand(-1, -1, -1, tensor.shape[-1]))
        return taken.unflatten(2, (group, -1)).flatten(1, 2)  # [B, Hq, P page_size, D]

    hidden = ~visible[:, :, None]
    # The softmax of 16-bit scores is in float32, as in fused attention.
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ rows(key).mT).to(wide) * (size**-0.5 if scale is None else scale)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0.0).to(query.dtype)
    return weights @ rows(value).masked_fill(~visible[..., None], 0.0)


def one_token(query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None) -> None:
    """Check the arguments of a decoding step."""
    checks.attention_arguments(query, key, value)
    if query.shape[2] != 1:
        raise ValueError(f"query: expected one token, [B, Hq, 1, D], got {list(query.shape)}")
    if key_padding_mask is not None:
        checks.padding_mask(key_padding_mask, key.shape[0], key.shape[2], key)


def bounds_of(key: Tensor, page_size: int, key_padding_mask: Tensor | None, kept: PageBounds | None) -> PageBounds:
    """`kept`, whose shapes are checked, or `page_bounds` of the keys."""
    if kept is None:
        return page_bounds(key, page_size, key_padding_mask)
    checks.positive_int("page_size", page_size)
    batch, heads, keys, size = key.shape
    shape = (batch, heads, ceil_div(keys, page_size), size)
    for name, bound in (("bounds.least", kept.least), ("bounds.most", kept.most)):
        checks.tensor(name, bound, shape, key)
    checks.tensor("bounds.real", kept.real, (batch, shape[2]), key)
    return kept


def last_page(key: Tensor, page_size: int, key_padding_mask: Tensor | None) -> Tensor:
    """[B]: the page of the newest real key."""
    keys = key.shape[2]
    if key_padding_mask is None:
        return torch.full((key.shape[0],), ceil_div(keys, page_size) - 1, device=key.device)
    positions = torch.arange(keys, device=key.device)
    return positions.masked_fill(~key_padding_mask, 0).amax(-1) // page_size
