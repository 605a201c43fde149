"""Dynamic Memory Sparsification (DMS, arXiv 2506.05345), inference: a key that is marked leaves after a window."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flexdma import checks
from flexdma.lifespans import Lifespans
from flexdma.lifespans.selection import on_device
from flexdma.policies.within_documents import within_documents


def dms_lifespans(
    alpha: Tensor,
    window_size: int | Sequence[int],
    *,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Lifespans:
    """A key with alpha > 0 dies after `window_size` queries; the others live to the end of their document.

    alpha: [B, H, K], any float dtype: the logit of evicting each key.  A head decides for itself; H = 1 decides for all.
        NaN is not above 0.
    window_size: one int, or H ints.  A query sees the last `window_size` keys, its own included, whatever their alpha.
        NVIDIA's `dms_window_size` does not count the query's own key: it is window_size - 1.
    key_padding_mask, document_ids: as in `causal_top_w`.

        alpha = [1, -1, 1, 1], window_size = 2      query 0: 0
                                                    query 1: 0 1
            birth = [0 1 2 3]                       query 2:   1 2
            death = [2 4 4 4]                       query 3:   1 2 3

    Returns Lifespans [B, H, K].  The number of keys that a query sees is not bounded.
    Raises ValueError or TypeError naming the argument.  O(K).
    """
    checks.selected_keys(alpha, key_padding_mask, document_ids, "alpha")
    return after_window(alpha.detach() > 0, window_size, key_padding_mask, document_ids)


def after_window(
    evicted: Tensor, window_size: int | Sequence[int], key_padding_mask: Tensor | None, document_ids: Tensor | None
) -> Lifespans:
    """Evicted keys [B, H, K] bool die `window_size` positions after their own, the others with their documents."""
    window = on_device(checks.per_head("window_size", window_size, evicted.shape[1]), evicted.device)
    position = torch.arange(evicted.shape[-1], device=evicted.device)
    death = torch.where(evicted, position + window, evicted.shape[-1])
    return within_documents(death, key_padding_mask, document_ids)
