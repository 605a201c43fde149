"""Negative log-likelihoods by one forward pass, without a cache and without the logits of all tokens at once.

The body of the model computes hidden states for all tokens.  Then the model's own forward pass runs on a chunk of them at a
time, with its body replaced, so that what a family does to its logits (scaling, softcap) is done here too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

CHUNK = 512  # tokens whose logits exist at once


def nll_by_position(model: Any, ids: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """Negative log-likelihood [N - 1], float32, in nats: element i is that of token i + 1 after tokens 0 to i.

    model: a causal language model of transformers.  ids: [1, N] or [N], int64.
    Memory: hidden states of N tokens, and logits of `chunk` tokens.
    """
    ids = ids.reshape(1, -1)
    return torch.cat(
        [
            cross_entropy(logits.float(), ids[0, start + 1 : start + 1 + len(logits)], reduction="none")
            for start, logits in _logits(model, ids, 0, ids.shape[1] - 1, chunk)
        ]
    )


def logits_after(model: Any, ids: Tensor, first: int, last: int) -> Tensor:
    """Logits [last - first, V] that follow the tokens first .. last - 1 of ids [1, N]."""
    return torch.cat([logits for _, logits in _logits(model, ids, first, last, CHUNK)])


@torch.no_grad()
def _logits(model: Any, ids: Tensor, first: int, last: int, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """(first token, logits [up to chunk, V]) for the tokens first .. last - 1."""
    ids = ids.to(model.device)
    body = _body(model)
    output = body(input_ids=ids, use_cache=False)
    hidden = output.last_hidden_state
    for start in range(first, last, chunk):
        end = min(start + chunk, last)
        output.last_hidden_state = hidden[:, start:end]
        with _replaced(body, output) as calls:
            logits = model(input_ids=ids[:, start:end], use_cache=False).logits[0]
        if not calls:
            raise TypeError(f"model: expected a forward pass that calls {type(body).__name__}, got another one")
        yield start, logits


def _body(model: Any) -> Any:
    """The part that computes hidden states: in OPT, Bart and others the decoder inside of the base model."""
    from transformers import PreTrainedModel

    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


@contextmanager
def _replaced(body: Any, output: Any) -> Iterator[list[object]]:
    """Inside, calls of `body` return `output`.  The list has one item per call."""
    own = body.__dict__.get("forward")
    calls: list[object] = []

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
