"""Selective copying (arXiv 2312.00752, MAD): tokens among noise, to be repeated in order at the end."""

from dataclasses import dataclass

import torch

from flexdma.tools.experiments.tasks.task import IGNORED, Batch, DrawnTask, distinct


@dataclass(frozen=True)
class Copying(DrawnTask):
    """`tokens` content tokens at random positions among noise; then as many questions, one per token, in order.

    length: N, the questions included.  content, noise: how many symbols of each kind.

        length 8, tokens 2:   n3 c5 n1 n1 c2 n4 | ?0 ?1       targets c5 c2
    """

    length: int = 128
    tokens: int = 8
    content: int = 16
    noise: int = 32

    def __post_init__(self) -> None:
        if 2 * self.tokens > self.length:
            raise ValueError(f"tokens: expected at most length / 2 = {self.length // 2}, got {self.tokens}")

    @property
    def symbols(self) -> int:
        """Content, noise, and the questions."""
        return self.content + self.noise + self.tokens

    @property
    def convolution(self) -> int:
        """None is needed."""
        return 1

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """See `Task`."""
        first = self.length - self.tokens
        at = distinct(size, self.tokens, first, generator).sort(-1).values
        token = torch.randint(self.content, (size, self.tokens), generator=generator)
        noise = self.content + torch.randint(self.noise, (size, first), generator=generator)
        asked = self.content + self.noise + torch.arange(self.tokens).expand(size, -1)
        position = first + torch.arange(self.tokens)
        targets = torch.full((size, self.length), IGNORED)
        distance = torch.zeros(size, self.length, dtype=torch.int64)
        targets[:, first:], distance[:, first:] = token, position - at
        return Batch(torch.cat([noise.scatter(-1, at, token), asked], -1)[..., None], targets, distance)
