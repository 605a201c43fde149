"""Sliding-window attention: the last w tokens.

Beltagy, Peters and Cohan, "Longformer", arXiv 2004.05150; Mistral 7B, arXiv 2310.06825.
"""

from torch import Tensor

from flexdma import checks
from flexdma.signatures import MaskMod


def sliding_window_mask_mod(window_size: int) -> MaskMod:
    """True for the last `window_size` keys, the query's own included.  Raises ValueError if window_size < 1."""
    checks.positive_int("window_size", window_size)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (q_idx - kv_idx < window_size)

    return mask_mod
