"""Lifespans: a mask as one interval of query positions per key.

A causal running top-w never readmits a key (a later query only adds competitors), so the mask of Dynamic Mask Attention
(arXiv 2508.02124) is exactly  birth[j] <= i < death[j].  FlashMask (arXiv 2410.01359) has the same format.  SparseK (arXiv
2406.16747) also bounds its cache by evicting keys for ever.

Shape legend of all files: B batch, Hq query heads, Hkv key/value heads, G = Hq / Hkv, Q and K sequence lengths, D and Dv
head sizes of key and value, w window_size.  H is Hkv or 1.
Packed: L places, R row blocks, C key blocks.  Gathered: R blocks of M queries, C keys per block.  In a state: C slots.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Lifespans(NamedTuple):
    """Key j is visible to the query at position i  <=>  birth[..., j] <= i < death[..., j].

    birth, death: [B, H, K] int32, contiguous.  A selection makes birth[..., j] = j and birth <= death <= K.  birth = death
        means never visible (padding, -inf, outranked on arrival).
    """

    birth: Tensor
    death: Tensor


torch.serialization.add_safe_globals([Lifespans])  # torch.load(weights_only=True) loads no other classes
