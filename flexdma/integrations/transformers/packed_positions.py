"""position_ids that restart are packed sequences, found once in a forward pass, by a hook of the model.

Transformers detects them in its masks, but not with a cache and not in every family, and for flash-attention in every layer.
A hook before the model sees them in every family, and adds document numbers to the keywords, which models pass on to
attention.  Layers then need not read values, and activation checkpointing recomputes with the same documents.
"""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexdma.integrations.transformers.cache import given_cache
from flexdma.transforms import can_read

# The keyword that the hook adds: document numbers [1 or B, K], or None for one document.  While compiling and for meta and
# fake tensors values cannot be read, and the numbers may all be 0.
POSITION_DOCUMENTS = "position_documents"


def find_packed_positions(model: nn.Module) -> None:
    """Register the hook on a model and on the models inside it, which callers may use without it, as PEFT does."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        parameters = inspect.signature(module.forward).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            module.register_forward_pre_hook(partial(_add_documents, tuple(parameters)), with_kwargs=True)


def _add_documents(names: Sequence[str], model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """The pre-hook.  names: of the parameters of the model's forward."""
    if POSITION_DOCUMENTS in kwargs:
        return None
    given = dict(zip(names, args, strict=False)) | kwargs
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() > 2:
        raise ValueError(
            f"attention_mask: expected [B, tokens] with 1 for real tokens, got {list(mask.shape)} of {mask.dtype}; masks of "
            "queries by keys are not supported"
        )
    documents = None
    if mask is None:
        cache = given_cache(given.values())
        documents = _documents(given.get("position_ids"), 0 if cache is None else cache.get_seq_length())
    return args, kwargs | {POSITION_DOCUMENTS: documents}


def position_documents(arguments: dict[str, Any], mask: Tensor | None, past: int) -> Tensor | None:
    """Document numbers [1 or B, K] from the arguments of a layer; None for one document.

    mask: of the layer.  past: number of tokens in the cache.
    """
    if POSITION_DOCUMENTS in arguments:
        return arguments[POSITION_DOCUMENTS]
    # Some families (Falcon, Nemotron, StableLm) pass positions on to their layers, but no other keywords.
    return None if mask is not None else _documents(arguments.get("position_ids"), past)


def _documents(position_ids: object, past: int) -> Tensor | None:
    """Document numbers [1 or B, K] int64 of positions [1 or B, K] in the first forward pass; None for one document.

    The rule is that of transformers' masks (`find_packed_sequence_indices`): a position that does not follow the one before
    it begins a document.
    Raises ValueError where positions restart after `past` tokens.
    """
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or position_ids.shape[1] == 1:
        return None
    if not can_read(position_ids):
        return None if past else _numbers(position_ids)
    numbers = _numbers(position_ids)
    if not numbers[:, -1].any():
        return None
    if past:
        raise ValueError(
            "position_ids: expected consecutive positions with a cache that is not empty, got positions that restart; "
            "packed sequences need one forward pass"
        )
    return numbers


def _numbers(position_ids: Tensor) -> Tensor:
    return torch.nn.functional.pad((position_ids.diff(dim=-1) != 1).cumsum(-1), (1, 0))
