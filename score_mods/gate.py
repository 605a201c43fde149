"""The gate as a score_mod: each key's gate is added to its attention logit.

Dynamic Mask Attention, arXiv 2508.02124: the number that selects keys also enters the softmax, so that the selection is
trained by ordinary back-propagation.
"""

from torch import Tensor

from flexdma import checks
from flexdma.signatures import ScoreMod


def gate_score_mod(gate: Tensor, *, num_query_heads: int) -> ScoreMod:
    """Score + gate[key].

    gate: [B, H, K], any float dtype; on CUDA it may require gradients.
    num_query_heads: Hq; query head h reads gate head h // (Hq / H).  FlexAttention passes a score_mod no number of heads:
        with a default of H, a kernel for grouped heads would read beyond the gate.

    The sum rounds at the size of the gate, as any sum does; for gates that grow with position use
    `flexdma.dynamic_mask_attention`, which adds differences.  Raises ValueError where the heads do not divide.
    """
    checks.tensor("gate", gate, ("B", "H", "K"))
    checks.floating("gate", gate)
    group = checks.group_size("gate", gate.shape[1], num_query_heads)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + gate[b, h // group, kv_idx]

    return score_mod
