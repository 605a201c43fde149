"""Attention of one query to the keys of a state: plain attention over C slots, in operations that compile and export."""

import torch
from torch import Tensor

from flexdma.lowerings.hidden import HIDDEN
from flexdma.lowerings.sink_logits import share_of_keys, sink_scores
from flexdma.mixed_precision import without_autocast
from flexdma.signatures import ScoreMod, modified_scores
from flexdma.state.value import State


def attended(
    query: Tensor,
    now: Tensor,
    state: State,
    scale: float,
    score_mod: ScoreMod | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention of query [B, Hq, 1, D] at positions now [B] to the keys of the state."""
    query_heads, heads = query.shape[1], state.position.shape[1]
    computed = torch.float64 if query.dtype == torch.float64 else torch.float32
    with without_autocast(query.device):
        rows = query.squeeze(2).unflatten(1, (heads, query_heads // heads)).to(computed) * scale
        output = weighted_values(rows @ state.key.to(computed).mT, now, state, score_mod, sink_logits)
    return output.flatten(1, 2).unsqueeze(2).to(query.dtype)


def weighted_values(
    scores: Tensor, now: Tensor, state: State, score_mod: ScoreMod | None, sink_logits: Tensor | None
) -> Tensor:
    """The values of the state, weighted by a softmax over scores [B, Hkv, G, C], gates and biases: [B, Hkv, G, Dv].

    now: [B], the position of the query.  Call it without autocast.
    """
    batch, heads, group, _slots = scores.shape
    of_keys = logit_bias(state)
    visible = state.position >= 0
    if state.bias is not None:
        visible = visible & (of_keys != float("-inf"))  # whose score would be below those of empty slots
    visible, added = visible[:, :, None], of_keys[:, :, None]  # [B, Hkv, 1, C]
    reference = torch.where(added.detach().isfinite(), added.detach(), float("-inf")).amax(-1, keepdim=True)
    difference = added - torch.where(reference == float("-inf"), 0.0, reference)
    bias = difference.to(scores.dtype)
    nothing = ~visible.any(-1, keepdim=True)
    if score_mod is not None:
        head = torch.arange(heads * group, device=scores.device).view(1, heads, -1, 1)
        row = torch.arange(batch, device=scores.device).view(-1, 1, 1, 1)
        # Empty slots get position 0, so score_mod never sees -1.
        position = state.position.clamp(min=0)[:, :, None]
        scores = modified_scores(score_mod, scores, row, head, now.view(-1, 1, 1, 1), position)
    # Not a sum with HIDDEN, because the key of an empty slot may not be finite.
    scores = torch.where(visible, scores + bias, HIDDEN)
    if score_mod is not None:
        nothing = nothing | (scores.detach().amax(-1, keepdim=True) <= HIDDEN / 2)
    weights = scores.masked_fill(nothing, 0.0).softmax(-1)
    output = torch.where(nothing, 0.0, weights @ state.value.to(scores.dtype))
    if sink_logits is None:
        return output
    sink = sink_scores(sink_logits, _best(of_keys, state.position)).squeeze(2)[..., None]  # [B, Hkv, G, 1]
    return output * share_of_keys(scores.logsumexp(-1, keepdim=True), sink.to(scores.dtype))


def logit_bias(state: State) -> Tensor:
    """[B, Hkv, C]: what each key of the state adds to its logits; -inf in empty slots."""
    return state.gate if state.bias is None else state.gate + state.bias


def _best(added: Tensor, position: Tensor) -> Tensor:
    """[B, Hkv, 1]: the largest finite number of [B, Hkv, C], of equal ones that of the newer key; 0 for none."""
    level = torch.where(added.isfinite(), added, float("-inf")).detach()
    best = level.amax(-1, keepdim=True)
    newest = torch.where(level == best, position, -1).argmax(-1, keepdim=True)
    return torch.where(best == float("-inf"), 0.0, added.gather(-1, newest))
