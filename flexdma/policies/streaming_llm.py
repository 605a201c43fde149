"""StreamingLLM (arXiv 2309.17453): the first keys, and the last ones."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flexdma import checks
from flexdma.lifespans import Lifespans, sliding_window


def streaming_llm_lifespans(
    key: Tensor,
    window_size: int | Sequence[int],
    *,
    sinks: int = 4,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Lifespans:
    """Each query sees the first `sinks` keys of its document and the last `window_size` keys, its own included.

    key: [B, Hkv, K, D]; only its shape and device are used.
    window_size: one int, or Hkv ints.  It counts positions, masked ones included.
    sinks: attention sinks, the first real keys of each document.
    key_padding_mask, document_ids: as in `causal_top_w`.

    Returns Lifespans [B, 1, K], or [B, Hkv, K] for windows per head.  A query sees at most window_size + sinks keys.
    StreamingLLM also numbers the keys of its cache anew, which a mask cannot do.
    Raises ValueError or TypeError naming the argument.  O(K).
    """
    batch, heads, keys, _size = checks.tensor("key", key, ("B", "Hkv", "K", "D")).shape
    windows = checks.per_head("window_size", window_size, heads)
    checks.masks(batch, keys, key, key_padding_mask, document_ids)
    gate = torch.zeros(batch, len(windows), keys, device=key.device)
    return sliding_window(gate, windows, sinks=sinks, key_padding_mask=key_padding_mask, document_ids=document_ids)
