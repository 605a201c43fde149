"""Multi-head latent attention of one token in its absorbed form (DeepSeek-V2, arXiv 2405.04434, section 2.1.2).

The keys and values of head h are linear in the latent c of a token: k = W_UK c, v = W_UV c.  So

    q . k = (W_UK^T q) . c          sum_j p_j v_j = W_UV (sum_j p_j c_j)

and a head attends to the latents themselves: one KV head, whose value is the first part of its key.
"""

import torch
from torch import Tensor, nn

from flexdma.mixed_precision import without_autocast
from flexdma.signatures import ScoreMod
from flexdma.state import State
from flexdma.state.one_query import weighted_values


def up_projections(kv_b_proj: nn.Module, like: Tensor, heads: int) -> Tensor:
    """W_UK and W_UV of each head, [H, dn + dv, r], of a projection of latents [..., r] of the dtype and device of `like`.

    Calls the module on the unit vectors and never reads its weight, because hooks, adapters and sharded, offloaded or
    quantised weights act in the call.  As much work as the keys and values of r latents.
    """
    rank = like.shape[-1]
    units = torch.eye(rank, dtype=like.dtype, device=like.device)
    return kv_b_proj(units).unflatten(-1, (heads, -1)).permute(1, 2, 0)


def absorbed_attention(
    query_nope: Tensor, query_rope: Tensor, now: Tensor, state: State, up: Tensor, scale: float,
    score_mod: ScoreMod | None,
) -> Tensor:  # fmt: skip
    """Attention [B, H, 1, dv] of one query at positions now [B] to the latents of the state.  O(H C (r + dr)) time.

    query_nope: [B, H, 1, dn], query_rope: [B, H, 1, dr].  up: of `up_projections`.
    state: its key is the rotated shared key [B, 1, C, dr], its value the latent [B, 1, C, r].
    """
    to_key, to_value = up.to(query_nope.dtype).split([query_nope.shape[-1], up.shape[1] - query_nope.shape[-1]], 1)
    with without_autocast(query_nope.device):
        query = (query_nope.transpose(0, 1).squeeze(2) @ to_key).transpose(0, 1)[:, None]  # [B, 1, H, r]
        computed = torch.promote_types(query.dtype, torch.float32)
        rotated = query_rope.transpose(1, 2)  # [B, 1, H, dr]
        scores = query.to(computed) @ state.value.to(computed).mT + rotated.to(computed) @ state.key.to(computed).mT
        latent = weighted_values(scores * scale, now, state, score_mod, None)[:, 0].to(query_nope.dtype)  # [B, H, r]
        return (latent.transpose(0, 1) @ to_value.mT).transpose(0, 1)[:, :, None]
