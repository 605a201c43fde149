"""Attention with linear biases: a penalty proportional to the distance between query and key.

Press, Smith and Lewis, "Train Short, Test Long", arXiv 2108.12409.
"""

from torch import Tensor

from flexdma import checks
from flexdma.signatures import ScoreMod


def alibi_score_mod(slopes: Tensor) -> ScoreMod:
    """Score + slopes[h] * (kv_idx - q_idx).  The distance is an integer, so it is exact at every position.

    slopes: [Hq], float, one per query head; the paper uses 2 ** (-8 (h + 1) / Hq).
    """
    checks.tensor("slopes", slopes, ("Hq",))
    checks.floating("slopes", slopes)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score + slopes[h] * (kv_idx - q_idx)

    return score_mod
