"""Negative log-likelihoods by one forward pass, without a cache and without the logits of all tokens at once."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flexdma.integrations.partial_logits import body_of, partial_logits

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
    output = body_of(model)(input_ids=ids, use_cache=False)
    for start in range(first, last, chunk):
        part = slice(start, min(start + chunk, last))
        yield start, partial_logits(model, ids[:, part], output, output.last_hidden_state[:, part])[0]
