"""Quest: the pages whose keys could score highest, by the bounds of each channel.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", arXiv 2406.10774.
"""

from torch import Tensor

from flexdma.page_selection.pages import PageBounds, attend_to_pages, best_pages, bounds_of, last_page, one_token


def quest_pages(query: Tensor, bounds: PageBounds, num_pages: int, last: Tensor) -> Tensor:
    """The pages that a token reads: the newest, and the others of largest bound, one choice per query head.

    query: [B, Hq, 1, D].  bounds: of `page_bounds`.  last: [B], the page of the newest key.
    A page's score is the sum over channels of max(q least, q most), which no key's product exceeds.
    Returns [B, Hq, min(num_pages, pages)], int64, in no order; of equal scores any.
    """
    return best_pages(bounds.scores(query), num_pages, last)


def quest_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_pages: int,
    page_size: int = 16,
    bounds: PageBounds | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Attention of one token to the `num_pages` pages that Quest picks from a full cache.

    query: [B, Hq, 1, D], the newest token.  key: [B, Hkv, K, D].  value: [B, Hkv, K, Dv].
    num_pages: pages read, with the newest one, which is always read.  Enough for all pages = full attention.
    bounds: `page_bounds(key, page_size, key_padding_mask)` if the caller keeps them; None computes them, in O(K D).
    scale: None = D ** -0.5.  key_padding_mask: [B, K], True for real keys.

        q = [1 -1], pages of 2 keys (2 0)(0 2) | (1 1)(1 0)     bounds: 2 - 0 = 2 | 1 - 0 = 1
        The best product in the first page is 2, and in the second 1.

    Returns [B, Hq, 1, Dv].  O(K D / page_size + num_pages page_size D) per query head, with bounds that are kept.
    Raises ValueError or TypeError naming the argument.
    """
    one_token(query, key, value, key_padding_mask)
    bounds = bounds_of(key, page_size, key_padding_mask, bounds)
    pages = quest_pages(query, bounds, num_pages, last_page(key, page_size, key_padding_mask))
    return attend_to_pages(
        query, key, value, pages, page_size=page_size, scale=scale, key_padding_mask=key_padding_mask
    )
