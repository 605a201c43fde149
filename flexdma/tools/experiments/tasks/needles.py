"""Needles in a haystack of bytes: numbers hidden among letters and asked for later, in sequences of any length."""

import string
from dataclasses import dataclass

import torch
from torch import Tensor

from flexdma.tools.experiments.tasks.task import IGNORED, Batch, DrawnTask, distinct

NAMES = string.ascii_uppercase.encode()
DIGITS = string.digits.encode()
FILLER = string.ascii_lowercase.encode() + b" "
MARK, ASK = b"#", b"?"


@dataclass(frozen=True)
class Needles(DrawnTask):
    """`needles` numbers with different names among random letters, and a question for each.

    length: N.  digits: of a number.  A convolution joins the bytes of a needle.
    at_end: whether all questions are at the end, after the haystack.  Otherwise a question is anywhere after its needle, so
        that a model that starts as a window finds some answers in it.

        needles 2, digits 1:          fq#K7zxb?K7nw#A3tyku?A3e        targets: at K 7, at A 3
        needles 2, digits 1, at_end:  fq#A3zxbncvnw#K7tyku?A3?K7

    Positions are not rotated, because no model that is trained at one length has seen the angles of longer ones.
    """

    length: int = 512
    needles: int = 16
    digits: int = 1
    at_end: bool = False

    def __post_init__(self) -> None:
        if self.needles > len(NAMES):
            raise ValueError(f"needles: expected at most {len(NAMES)}, one per letter, got {self.needles}")
        if 2 * self.needles * self.size > self.length:
            least = 2 * self.needles * self.size
            raise ValueError(f"length: expected at least {least}, the needles and questions, got {self.length}")

    @property
    def size(self) -> int:
        """The bytes of a needle, and of a question: a mark, a name and a number."""
        return 2 + self.digits

    @property
    def haystack(self) -> int:
        """The bytes before questions at the end."""
        return self.length - self.needles * self.size

    @property
    def symbols(self) -> int:
        """All bytes."""
        return 256

    @property
    def convolution(self) -> int:
        """The size of a needle."""
        return self.size

    @property
    def rotary(self) -> bool:
        """See the class."""
        return False

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """See `Task`."""
        if self.at_end:
            place = distinct(size, self.needles, self.haystack // self.size, generator) * self.size
            ask = (self.haystack + self.size * torch.arange(self.needles)).expand(size, -1)
        else:
            pairs = distinct(size, 2 * self.needles, self.length // self.size, generator).unflatten(-1, (-1, 2))
            place, ask = (self.size * pairs.sort(-1).values).unbind(-1)
        name = torch.tensor(list(NAMES))[distinct(size, self.needles, len(NAMES), generator)]
        number = _drawn(DIGITS, (size, self.needles, self.digits), generator)
        offset = torch.arange(self.size)
        hidden, asked = place[..., None] + offset, ask[..., None] + offset
        symbols = _drawn(FILLER, (size, self.length), generator)
        symbols = symbols.scatter(-1, hidden.flatten(1), _written(MARK, name, number))
        symbols = symbols.scatter(-1, asked.flatten(1), _written(ASK, name, number))
        asking = asked[..., 1:-1]  # the name and all digits but the last
        targets = torch.full((size, self.length), IGNORED).scatter(-1, asking.flatten(1), number.flatten(1))
        distance = torch.zeros(size, self.length, dtype=torch.int64)
        distance.scatter_(-1, asking.flatten(1), (asking - hidden[..., 2:]).flatten(1))
        return Batch(symbols[..., None], targets, distance)


def _drawn(of: bytes, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.tensor(list(of))[torch.randint(len(of), shape, generator=generator)]


def _written(mark: bytes, name: Tensor, number: Tensor) -> Tensor:
    """[B, n] names and [B, n, d] numbers -> [B, n · (2 + d)] bytes."""
    return torch.cat([torch.full_like(name, mark[0])[..., None], name[..., None], number], -1).flatten(1)
