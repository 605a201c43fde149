"""The gate as a score_mod: it adds each key's gate to its attention logit.

Dynamic Mask Attention, arXiv 2508.02124: gates both select keys and enter the softmax, so ordinary back-propagation trains
the selection.
"""

from torch import Tensor

from flexdma import checks
from flexdma.signatures import ScoreMod


def gate_score_mod(gate: Tensor, *, num_query_heads: int) -> ScoreMod:
    """Score + gate[key].

    gate: [B, H, K], any float dtype; on CUDA it may require gradients.
    num_query_heads: Hq; query head h reads gate head h // (Hq / H).  It has no default, because FlexAttention does not pass
        the number of heads to a score_mod, and a kernel with a wrong number reads beyond the gate.

    The sum rounds at the size of the gate.  For gates that grow with position use `flexdma.dynamic_mask_attention`, which
    adds differences of gates.  Raises ValueError where H does not divide num_query_heads.
    """
    checks.tensor("gate", gate, ("B", "H", "K"))
    checks.floating("gate", gate)
    group = checks.group_size("gate", gate.shape[1], num_query_heads)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + gate[b, h // group, kv_idx]

    return score_mod
