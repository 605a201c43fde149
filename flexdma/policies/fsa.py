"""Flash Sparse Attention (FSA, the package flash-sparse-attn 2.0): a near band, a gap, and a distant band, per head."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexdma import checks
from flexdma.lifespans import Lifespans
from flexdma.lifespans.selection import on_device
from flexdma.policies.streaming_llm import streaming_llm_lifespans
from flexdma.policies.within_documents import within_documents


def fsa_lifespans(
    key: Tensor,
    window_size: int | Sequence[int],
    gap: int | Sequence[int],
    band: int | Sequence[int],
    *,
    sinks: int = 0,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[Lifespans, Lifespans]:
    """A query sees the last `window_size` keys, not the `gap` keys before them, but the `band` keys before those.

    key: [B, Hkv, K, D]; only its shape and device are used.
    window_size, gap, band: one int, or Hkv ints.  window_size counts the query's own key; gap and band may be 0.
    sinks: the first n keys of each document stay visible to its end.
    key_padding_mask, document_ids: as in `causal_top_w`.  Sizes count positions, masked ones included; sinks count real keys.

        K = 6, window_size = 1, gap = 2, band = 2               query 0: 0
                                                                query 1:   1
        birth, death = [0 1 2 3 4 5], [1 2 3 4 5 6]             query 2:     2
                       [3 4 5 6 6 6], [5 6 6 6 6 6]             query 3: 0     3
                                                                query 4: 0 1     4
                                                                query 5:   1 2     5

    FSA's `window_sizes` [Hkv, 4] has columns (sink, left, right, near), here (sinks, band, gap, window_size).  By default FSA
    divides the distances beyond the near band among the heads, so that all heads together see every key.
    Returns two Lifespans [B, 1 or Hkv, K] for `lifespan_attention`, disjoint, each ending with its document.  A query sees at
    most window_size + band + sinks keys.
    Raises ValueError or TypeError naming the argument.  O(K).
    """
    batch, heads, keys, _size = checks.tensor("key", key, ("B", "Hkv", "K", "D")).shape
    checks.masks(batch, keys, key, key_padding_mask, document_ids)
    near, after, length = (
        on_device(checks.per_head(name, sizes, heads, minimum), key.device).expand(heads, 1)
        for name, sizes, minimum in (("window_size", window_size, 1), ("gap", gap, 0), ("band", band, 0))
    )
    masks: dict[str, Any] = {"key_padding_mask": key_padding_mask, "document_ids": document_ids}
    first = streaming_llm_lifespans(key, window_size, sinks=sinks, **masks)
    whole = within_documents(torch.full((batch, heads, keys), keys, device=key.device), **masks)
    begin = torch.arange(keys, device=key.device) + near + after
    birth, death = (torch.minimum(bound, whole.death) for bound in (begin, begin + length))
    # A key whose first interval lasts to the end of its document has no second one.
    death = torch.where(first.death == whole.death, birth, death)
    return first, Lifespans(*(bound.to(torch.int32).contiguous() for bound in (birth, death)))
