"""Logits of some tokens of a causal language model, from hidden states that its body has computed for all.

The model's own forward pass runs with its body replaced, so that what a family does to its logits (scaling, softcap) is done
here too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


def body_of(model: Any) -> Any:
    """The part of a causal language model that computes hidden states: in OPT and others the decoder in its base model."""
    from transformers import PreTrainedModel

    decoder = model.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else model.base_model


def partial_logits(model: Any, ids: Tensor, output: Any, hidden: Tensor) -> Tensor:
    """Logits [B, n, V] of the tokens ids [B, n].

    output: of the body, for all tokens.  hidden: [B, n, hidden size], of these.
    Raises TypeError for a model whose forward pass does not call its body.
    """
    body = body_of(model)
    with _replaced(body, type(output)(**{**output, "last_hidden_state": hidden})) as calls:
        logits = model(input_ids=ids, use_cache=False).logits
    if not calls:
        raise TypeError(f"model: expected a forward pass that calls {type(body).__name__}, got another one")
    return logits


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
