"""HAX (arXiv 2507.00449): key selection.  Its other part, hash buckets, is no interval per key."""

from collections.abc import Sequence

from torch import Tensor

from flexdma import checks
from flexdma.lifespans import Lifespans, causal_top_w


def hax_lifespans(
    score: Tensor,
    window_size: int | Sequence[int],
    *,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Lifespans:
    """Each query sees the `window_size` best-scored keys at or before it; of equal scores the newer one.

    score: [B, H, K], any float dtype: what HAX's network computes from a key and the sum of queries up to it.  -inf = never
        visible, NaN ranks highest.
    window_size: one int, or H ints.
    key_padding_mask, document_ids: as in `causal_top_w`, which this is: HAX's cumulative top-k never readmits a key.

    Returns Lifespans [B, H, K].
    Raises ValueError or TypeError naming the argument.  O(K log K).
    """
    checks.selected_keys(score, key_padding_mask, document_ids, "score")
    return causal_top_w(score, window_size, key_padding_mask=key_padding_mask, document_ids=document_ids)
