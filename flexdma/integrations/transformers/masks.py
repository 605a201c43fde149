"""The mask that layers get: one number per key, where transformers' own masks are Q x K.

The operator computes causality and the selection.  Padding and packed sequences remain, and fit in a [B, 1, 1, K] tensor,
which transformers passes through unchanged because it has four dimensions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from flexdma.transforms import can_read, is_recorded

NAME = "flexdma"
# Full attention of the same model, see `full_attention`.
FULL = "flexdma_full"
# The dtype of a mask that is not causal.
BIDIRECTIONAL = torch.int8


def light_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """Transformers' mask interface.  Returns None or [B, 1, 1, K]; None for one token on a CPU without masked ones.

    bool: True = real token.  int64: the number of the key's document.  int8: a bidirectional mask, which `read_light_mask`
    refuses.
    A sliding window in `mask_function` is ignored, because the window of `convert_to_dma` replaces it and is not larger.
    Raises ValueError for a mask function of the model's own, and for a mask of another length than the tokens.
    """
    if "allow_is_bidirectional_skip" in others:
        # Refused where a layer uses it: decoders of encoder-decoders make one for cross-attention even if they have none.
        return torch.zeros(batch_size, 1, 1, kv_length, dtype=BIDIRECTIONAL, device=device)
    if use_vmap:
        raise ValueError("attention_mask: expected a causal mask with padding, got a model with its own mask function")
    if attention_mask is not None:
        if attention_mask.shape != (batch_size, kv_offset + kv_length):
            raise ValueError(
                f"attention_mask: expected [B, past and new tokens] = {[batch_size, kv_offset + kv_length]}, "
                f"got {list(attention_mask.shape)}"
            )
        mask = attention_mask[:, None, None, kv_offset:]
        # A token that `generate` decodes: read once here, no layer needs a mask.
        is_real = q_length == 1 and mask.dtype == torch.bool and mask.device.type == "cpu" and can_read(mask)
        return None if is_real and bool(mask.all()) else mask
    if mask_function is causal_mask_function or q_length != kv_length:
        return None  # packed sequences come in one forward pass
    documents = _documents(mask_function, batch_size, q_length, device)
    return None if documents is None else documents[:, None, None, :]


def _documents(mask_function: Callable, batch: int, length: int, device: torch.device | str) -> Tensor | None:
    """Document numbers [B, K] of packed sequences: a token that does not see the one before it begins a document.

    None where there is one document.  While compiling and for meta and fake tensors values cannot be read, and it is never
    None.
    """
    row = torch.arange(batch, device=device)[:, None]
    later = torch.arange(1, length, device=device)[None, :]
    head = torch.zeros((), dtype=torch.int64, device=device)
    begins = ~mask_function(row, head, later, later - 1).expand(batch, length - 1)
    if not (torch.compiler.is_compiling() or is_recorded(begins)):
        if mask_function(row, head, later - 1, later).any():
            raise ValueError("attention_mask: expected a causal mask, got one in which a token sees the next")
        if not begins.any():
            return None
    return torch.nn.functional.pad(begins.cumsum(-1), (1, 0))


def read_light_mask(mask: object, batch: int, keys: int) -> dict[str, Tensor | None]:
    """The operator's key_padding_mask and document_ids.  Raises ValueError for masks that are not `light_mask`'s."""
    if mask is None:
        return {"key_padding_mask": None, "document_ids": None}
    if isinstance(mask, Tensor) and mask.dtype == BIDIRECTIONAL:
        raise ValueError("attention_mask: expected causal attention, got a bidirectional mask")
    if not isinstance(mask, Tensor) or mask.shape != (batch, 1, 1, keys) or mask.dtype not in (torch.bool, torch.int64):
        got = f"{list(mask.shape)} of {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: expected [B, tokens] with 1 for real tokens (inside a layer {[batch, 1, 1, keys]}), got {got}; "
            "masks of queries by keys are not supported"
        )
    numbers = mask[:, 0, 0]
    padded = mask.dtype == torch.bool
    return {"key_padding_mask": numbers if padded else None, "document_ids": None if padded else numbers}


AttentionMaskInterface.register(NAME, light_mask)
