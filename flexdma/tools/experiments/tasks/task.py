"""What every task provides."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

HELD_OUT_SEED = 2**31  # of sequences that no training draws
IGNORED = -100  # the target of a position that is not asked; cross_entropy's default


class Batch(NamedTuple):
    """Sequences and what is asked.

    symbols: [B, N, S] int64.  The embeddings of the S symbols of a position are added.
    targets: [B, N] int64, the symbol to predict at a position; IGNORED where nothing is asked.
    distance: [B, N] int64, from a position that asks back to the newest one that has its answer; 0 elsewhere.
    """

    symbols: Tensor
    targets: Tensor
    distance: Tensor


class Task(Protocol):
    """A task of fixed sizes."""

    @property
    def length(self) -> int:
        """N, the length of a sequence."""

    @property
    def symbols(self) -> int:
        """The number of different symbols."""

    @property
    def convolution(self) -> int:
        """Width of a causal convolution before each attention that the task needs; 1 = none."""

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are rotated by their positions."""

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """`size` sequences, drawn by the generator alone."""

    def held_out(self, size: int) -> Batch:
        """`size` sequences that no training draws, the same on every call."""


class DrawnTask:
    """The base of tasks whose sequences are drawn without end, at positions that are rotated."""

    @property
    def rotary(self) -> bool:
        """See `Task`."""
        return True

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """See `Task`."""
        raise NotImplementedError

    def held_out(self, size: int) -> Batch:
        """See `Task`."""
        return self.batch(size, torch.Generator().manual_seed(HELD_OUT_SEED))


def distinct(size: int, number: int, of: int, generator: torch.Generator) -> Tensor:
    """[size, number] int64: in each row that many different numbers below `of`, in random order."""
    return torch.rand(size, of, generator=generator).argsort(-1)[:, :number]
