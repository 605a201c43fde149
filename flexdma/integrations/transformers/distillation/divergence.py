"""The Kullback-Leibler divergence of two sets of predictions, without the logits of all tokens at once.

The body of a model computes hidden states for all tokens.  Then the model's own forward pass runs on a chunk of them at a
time, with its body replaced, so that what a family does to its logits (scaling, softcap) is done here too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

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


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a causal language model that computes hidden states: in some families the decoder inside its base model."""
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def _log_probabilities(model: Any, ids: Tensor, output: Any, hidden: Tensor) -> Tensor:
    made = type(output)(**{**output, "last_hidden_state": hidden})
    with _replaced(body_of(model), made) as calls:
        logits = model(input_ids=ids, use_cache=False).logits
    if not calls:
        raise TypeError(f"model: expected a forward pass that calls {type(body_of(model)).__name__}, got another one")
    return logits.float().log_softmax(-1)


@contextmanager
def _replaced(body: Any, output: Any) -> Iterator[list[None]]:
    """Inside, calls of `body` return `output`.  The list has one item per call."""
    own, calls = body.__dict__.get("forward"), list[None]()

    def forward(*_arguments: Any, **_named: Any) -> Any:
        calls.append(None)
        return output

    body.forward = forward
    try:
        yield calls
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own
