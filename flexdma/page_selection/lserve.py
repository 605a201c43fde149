"""LServe: large pages, each scored by the best of the smaller logical pages inside it.

Yang et al., "LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention", arXiv 2502.14866.  The other half
of LServe, heads that see sinks and a window, is `flexdma.policies.streaming_llm_lifespans`; quantized pages are not here.
"""

from torch import Tensor
from torch.nn.functional import pad

from flexdma import checks
from flexdma.page_selection.pages import PageBounds, attend_to_pages, best_pages, bounds_of, last_page, one_token


def lserve_pages(query: Tensor, bounds: PageBounds, num_pages: int, last: Tensor, *, logical_per_page: int) -> Tensor:
    """The pages that a token reads: the newest, and the others whose best logical page has the largest bound.

    query: [B, Hq, 1, D].  bounds: of `page_bounds(key, logical_size)`.  last: [B], the page of the newest key.
    logical_per_page: logical pages of a page.
    LServe uses a choice for several tokens: pass the result to `attend_to_pages` again, until the newest page is full.
    Returns [B, Hq, min(num_pages, pages)], int64, in no order; of equal scores any.
    """
    checks.positive_int("logical_per_page", logical_per_page)
    scores = bounds.scores(query)
    scores = pad(scores, (0, -scores.shape[-1] % logical_per_page), value=float("-inf"))
    return best_pages(scores.unflatten(-1, (-1, logical_per_page)).amax(-1), num_pages, last)


def lserve_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_pages: int,
    page_size: int = 64,
    logical_size: int = 16,
    bounds: PageBounds | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Attention of one token to the `num_pages` pages that LServe picks from a full cache.

    query: [B, Hq, 1, D], the newest token.  key: [B, Hkv, K, D].  value: [B, Hkv, K, Dv].
    page_size, logical_size: keys of a page and of a logical page, which divides it.  With one size for both this is Quest.
    bounds: `page_bounds(key, logical_size, key_padding_mask)` if the caller keeps them.
    num_pages, scale, key_padding_mask: as in `quest_attention`.

        page_size = 4, logical_size = 2, bounds of logical pages  1 7 | 5 5       the first page is picked: 7 > 5

    Returns [B, Hq, 1, Dv].  O(K D / logical_size + num_pages page_size D) per query head, with bounds that are kept.
    Raises ValueError or TypeError naming the argument.
    """
    one_token(query, key, value, key_padding_mask)
    checks.positive_int("logical_size", logical_size)
    checks.positive_int("page_size", page_size)
    if page_size % logical_size:
        raise ValueError(f"page_size: expected a multiple of logical_size = {logical_size}, got {page_size}")
    bounds = bounds_of(key, logical_size, key_padding_mask, bounds)
    pages = lserve_pages(
        query,
        bounds,
        num_pages,
        last_page(key, page_size, key_padding_mask),
        logical_per_page=page_size // logical_size,
    )
    return attend_to_pages(
        query, key, value, pages, page_size=page_size, scale=scale, key_padding_mask=key_padding_mask
    )
