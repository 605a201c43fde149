"""Learned sinks: one more term exp(sink_logit_h) in the softmax, with value 0, so that a head may attend to nothing.

GPT-OSS (arXiv 2508.10925); `softmax_one` with a learned one.  With L = log sum_j exp(score_j) over the keys of a query,

    sum_j exp(score_j) v_j / (sum_j exp(score_j) + exp(sink))  =  sigmoid(L - sink) * sum_j softmax_j(score) v_j,

so any attention that returns L supports sinks.  Scores are relative to the best gate that the query sees.  Constant gates
therefore change nothing, and gates that grow with position do not outgrow the sink.
"""

import torch
from torch import Tensor


def sink_scores(sink_logits: Tensor, reference: Tensor) -> Tensor:
    """sink_logits [Hq] for scores relative to `reference` [B, Hkv, Q], which is finite -> [B, Hkv, Q, G].

    The lowerings subtract a detached reference from scores.  The gradient of the reference enters here, through the sink.
    """
    heads = reference.shape[1]
    drift = (reference - reference.detach()).to(torch.promote_types(sink_logits.dtype, torch.float32))
    return sink_logits.view(heads, 1, -1) + drift[..., None]


def share_of_keys(log_sum: Tensor, sink: Tensor) -> Tensor:
    """The share of the weight that keys get beside the sink: sigmoid(L - sink); 0 for a row that sees no key (L = -inf)."""
    nothing = log_sum == float("-inf")
    return torch.where(nothing, 0.0, torch.sigmoid(torch.where(nothing, 0.0, log_sum) - sink))
