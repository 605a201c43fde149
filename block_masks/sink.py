"""Attention sinks: the first tokens stay visible.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.
"""

from torch import Tensor

from flexdma import checks
from flexdma.signatures import MaskMod


def sink_mask_mod(num_sinks: int) -> MaskMod:
    """True for the first `num_sinks` keys, causally.  Join it to a window with `or_masks`.

    Raises ValueError if num_sinks < 1.
    """
    checks.positive_int("num_sinks", num_sinks)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx < num_sinks) & (kv_idx <= q_idx)

    return mask_mod
