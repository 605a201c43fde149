"""Sequences packed into one row without padding, in the format of flash-attention's varlen functions: `cu_seqlens`."""

from typing import NamedTuple

import torch
from torch import Tensor

from flexdma import checks
from flexdma.transforms import can_read


class Sequences(NamedTuple):
    """S sequences in a row of T tokens.

    cu_seqlens: [S + 1] int64: 0, then the end of each sequence.  Empty sequences have the end of the one before.
    number: [T] int64, the sequence of each token.
    start: [T] int64, the first token of that sequence.

        cu_seqlens = [0 2 2 5]      number = [0 0 2 2 2], start = [0 0 2 2 2]
    """

    cu_seqlens: Tensor
    number: Tensor
    start: Tensor


def packed_sequences(cu_seqlens: object, tokens: int, like: Tensor, name: str = "cu_seqlens") -> Sequences:
    """The sequences that `cu_seqlens`, [S + 1] int32 or int64, gives to a row of this many tokens; S >= 1.

    Raises ValueError or TypeError naming the argument.  On a CPU outside of torch.compile and torch.func it reads the
    numbers.  Elsewhere wrong numbers give wrong sequences.
    """
    ends = ends_of_sequences(name, cu_seqlens, ("S + 1",), like)
    if ends.shape[0] < 2:
        raise ValueError(f"{name}: expected [S + 1] with S >= 1 sequences, got {list(ends.shape)}")
    if ends.device.type == "cpu" and can_read(ends):
        refuse_wrong_ends(name, ends, tokens)
    number = sequence_numbers(ends, tokens).clamp(max=ends.shape[0] - 2)
    ends = ends.long()
    return Sequences(ends, number, ends[number])


def ends_of_sequences(name: str, ends: object, shape: tuple[object, ...], like: Tensor) -> Tensor:
    """Raise unless it is an integer tensor of this shape on the device of `like`."""
    tensor = checks.tensor(name, ends, shape, like)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected torch.int32 or torch.int64, got {tensor.dtype}")
    return tensor


def refuse_wrong_ends(name: str, ends: Tensor, tokens: int) -> None:
    """Raise ValueError unless the numbers grow from 0 to the number of tokens.  Reads them."""
    if ends[0] != 0 or ends[-1] != tokens or (ends.diff() < 0).any():
        raise ValueError(f"{name}: expected growing numbers from 0 to {tokens} tokens, got {ends.tolist()}")


def sequence_numbers(ends: Tensor, tokens: int) -> Tensor:
    """[T] int64: the sequence of each token, for 0 and the ends of S sequences."""
    position = torch.arange(tokens, device=ends.device, dtype=ends.dtype)
    return torch.bucketize(position, ends[1:].contiguous(), right=True)
