"""The format of every mask here: one interval per key.

A causal running top-w never readmits a key (a later query only adds competitors), so the mask of Dynamic Mask Attention
(arXiv 2508.02124) is exactly  birth[j] <= i < death[j].  Interval masks per key are the format of FlashMask (arXiv
2410.01359); that eviction for ever bounds a cache is also the ground of SparseK (arXiv 2406.16747).

Shape legend, here and everywhere: B batch, Hq query heads, Hkv key/value heads, G = Hq / Hkv, Q and K sequence lengths,
D head size, w window_size.  H stands for Hkv or 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Lifespans(NamedTuple):
    """Key j is visible to the query at position i  <=>  birth[..., j] <= i < death[..., j].

    birth, death: [B, H, K] int32, contiguous.  A selection makes birth[..., j] = j and birth <= death <= K; birth = death:
        never visible (padding, -inf, outranked on arrival).
    """

    birth: Tensor
    death: Tensor


torch.serialization.add_safe_globals([Lifespans])  # torch.load(weights_only=True) takes no other classes
