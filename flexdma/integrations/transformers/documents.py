"""Packed sequences given by flash-attention's arguments: cu_seq_lens_q and cu_seq_lens_k, or seq_idx.

transformers' DataCollatorWithFlattening makes them, with or without position_ids that restart (`packed_positions.py`).  This
code does not read max_length_q and max_length_k, which follow from cu_seq_lens.
"""

from typing import Any

import torch
from torch import Tensor

from flexdma.sequences import ends_of_sequences, refuse_wrong_ends, sequence_numbers
from flexdma.transforms import can_read


def packed_documents(arguments: dict[str, Any], key: Tensor, past: int) -> Tensor | None:
    """Document numbers [B, K] of the keys [B, Hkv, K, D] of a first forward pass; None where no argument gives documents.

    arguments: of the layer: cu_seq_lens_q [N + 1] integers, 0 and the ends of N documents; cu_seq_lens_k, equal to it;
        seq_idx [B, K] integers, the number of each token's document.
    past: number of tokens in the cache.
    Raises TypeError or ValueError naming the argument.
    """
    names = [name for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx") if arguments.get(name) is not None]
    if not names:
        return None
    if past:
        raise ValueError(f"{names[0]}: expected None with a cache that is not empty, got it after {past} tokens")
    batch, keys = key.shape[0], key.shape[2]
    if names == ["seq_idx"]:
        return ends_of_sequences("seq_idx", arguments["seq_idx"], (batch, keys), key).long()
    if batch != 1:
        raise ValueError(f"{names[0]}: expected all sequences in one row, got {batch} rows")
    ends = ends_of_sequences("cu_seq_lens_q", arguments.get("cu_seq_lens_q"), ("N + 1",), key)
    ends_of_sequences("cu_seq_lens_k", arguments.get("cu_seq_lens_k"), tuple(ends.shape), key)
    return sequence_numbers(ends, keys)[None]


def refuse_other_documents(arguments: dict[str, Any], documents: Tensor) -> None:
    """Raise ValueError where other arguments contradict the `documents` [B, K] of `packed_documents`.

    It reads values, so only one layer of a model calls it.  It does nothing while compiling and for meta and fake tensors.
    """
    if not can_read(documents):
        return
    keys, inside = documents.shape[1], documents.diff(dim=-1) == 0
    ends, other = arguments.get("cu_seq_lens_q"), arguments.get("cu_seq_lens_k")
    if ends is not None and other is not None:
        if not torch.equal(ends, other):
            raise ValueError(f"cu_seq_lens_k: expected cu_seq_lens_q, {ends.tolist()}, got {other.tolist()}")
        refuse_wrong_ends("cu_seq_lens_q", ends, keys)
        numbers = arguments.get("seq_idx")
        if numbers is not None and not torch.equal(numbers.diff(dim=-1) == 0, inside):
            raise ValueError("seq_idx: expected the same documents as cu_seq_lens_q, got others")
    positions = arguments.get("position_ids")
    if positions is not None and positions.dim() == 2 and bool(((positions.diff(dim=-1) != 1) & inside).any()):
        raise ValueError("position_ids: expected consecutive positions in each document, got a restart inside one")


def refuse_growing_cache_after_documents(layer: Any, past: int, is_packed: bool) -> None:
    """Raise ValueError for a pass after packed sequences, because a DynamicCache keeps no document numbers.

    layer: of a DynamicCache.  The first pass sets its attribute `is_packed`.
    """
    if not past:
        layer.is_packed = is_packed
    elif getattr(layer, "is_packed", False):
        raise ValueError(
            "cache: expected DynamicMaskCache to continue packed sequences, got DynamicCache, which keeps no documents"
        )
