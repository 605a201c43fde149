"""score_mod recipes for plain FlexAttention and for `dynamic_mask_attention(score_mod=...)`.

Each recipe returns a score_mod.  To compose two, call one on the result of the other.
"""

from flexdma.score_mods.alibi import alibi_score_mod
from flexdma.score_mods.gate import gate_score_mod
from flexdma.score_mods.softcap import softcap_score_mod

__all__ = ["alibi_score_mod", "gate_score_mod", "softcap_score_mod"]
