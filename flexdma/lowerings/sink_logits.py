"""Learned sinks: one more term exp(sink_logit_h) in the softmax, whose value is 0, so that a head may attend to nothing.

GPT-OSS (arXiv 2508.10925); `softmax_one` with a learned one.  With L = log sum_j exp(score_j) over the keys of a query,

    sum_j exp(score_j) v_j / (sum_j exp(score_j) + exp(sink))  =  sigmoid(L - sink) * sum_j softmax_j(score) v_j,

so every attention that returns L has sinks.  Scores are relative to the best gate that the query sees: gates that are all the
same change nothing, and one that grows with position does not outgrow the sink.
"""

import torch
from torch import Tensor


def sink_scores(sink_logits: Tensor, reference: Tensor) -> Tensor:
    """sink_logits [Hq] for scores relative to `reference` [B, Hkv, Q], finite, its gradient included -> [B, Hkv, Q, G].

    Computations subtract a reference without a gradient.  For the softmax, adding it to the sink is the same.
    """
    heads = reference.shape[1]
    drift = (reference - reference.detach()).to(torch.promote_types(sink_logits.dtype, torch.float32))
    return sink_logits.view(heads, 1, -1) + drift[..., None]


def share_of_keys(log_sum: Tensor, sink: Tensor) -> Tensor:
    """What the sink leaves of the weight: sigmoid(L - sink), and 0 for a row that sees no key, where L = -inf."""
    nothing = log_sum == float("-inf")
    return torch.where(nothing, 0.0, torch.sigmoid(torch.where(nothing, 0.0, log_sum) - sink))
