"""The Kullback-Leibler divergence of two sets of predictions, without the logits of all tokens at once."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from flexdma.integrations.partial_logits import partial_logits

CHUNK = 256  # positions whose logits exist at once


def divergence(model: Any, ids: Tensor, teacher: Any, student: Any) -> Tensor:
    """Mean over all tokens of KL(teacher || student), in nats, float32.

    model: a causal language model.  ids: [B, N].  teacher, student: outputs of its body; the student's has a gradient.
    Memory: logits of CHUNK positions, which the backward computes again.
    """
    total = torch.zeros((), device=ids.device)
    for start in range(0, ids.shape[1], CHUNK):
        part = slice(start, start + CHUNK)

        def of_part(given: Tensor, own: Tensor, part: slice = part) -> Tensor:
            with torch.no_grad():
                target = _log_probabilities(model, ids[:, part], teacher, given)
            return kl_div(
                _log_probabilities(model, ids[:, part], student, own), target, reduction="sum", log_target=True
            )

        hidden = teacher.last_hidden_state[:, part], student.last_hidden_state[:, part]
        total = total + (
            checkpoint(of_part, *hidden, use_reentrant=False) if torch.is_grad_enabled() else of_part(*hidden)
        )
    return total / ids.numel()


def _log_probabilities(model: Any, ids: Tensor, output: Any, hidden: Tensor) -> Tensor:
    return partial_logits(model, ids, output, hidden).float().log_softmax(-1)
