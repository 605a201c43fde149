"""Multi-query associative recall among noise (zoology's MQAR, arXiv 2312.04927), at uniform distances.

Noise has symbols of its own.  Otherwise no gate, which knows the key's value alone, could tell a pair from noise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flexdma.tools.experiments.tasks.task import IGNORED, Batch, DrawnTask, distinct


@dataclass(frozen=True)
class Recall(DrawnTask):
    """`pairs` pairs of key and value among noise, and `questions` positions that ask for the value of a key.

    length: N.  keys, values, noise: how many symbols of each kind.
    form: "stacked"       key and value are the two symbols of one position: one layer can solve it
          "unstacked"     the value follows its key, and is asked for as the next symbol after the key; needs `convolution`
    overwritten: pairs whose key comes again with another value; the last value is asked for.
    lead: positions of noise before the first pair, so that no answer is among the sinks of a window.

        stacked, lead 1:  n5 . | k3 v7 | n1 . | k5 v2 | n4 . | k3 ? | n2 . | k5 ?      ? = asked, . = no second symbol
        target:                                                v7            v2
    """

    length: int = 128
    pairs: int = 8
    questions: int = 16
    keys: int = 32
    values: int = 32
    noise: int = 32
    form: str = "stacked"
    overwritten: int = 0
    lead: int = 4

    def __post_init__(self) -> None:
        width = 1 if self.form == "stacked" else 2
        written = (self.pairs + self.overwritten) * width
        if self.form not in ("stacked", "unstacked"):
            raise ValueError(f"form: expected 'stacked' or 'unstacked', got {self.form!r}")
        if self.pairs > self.keys or self.overwritten > self.pairs:
            raise ValueError(
                f"pairs: expected at least overwritten = {self.overwritten} and at most keys = {self.keys}, got {self.pairs}"
            )
        if self.lead % width:
            raise ValueError(f"lead: expected a multiple of the {width} positions of a pair, got {self.lead}")
        needed = self.lead + written + self.questions * width
        if needed > self.length:
            raise ValueError(
                f"length: expected at least {needed}, the lead, the pairs and the questions, got {self.length}"
            )

    @property
    def symbols(self) -> int:
        """Keys, values, noise, and one symbol for "none" beside noise, one for "asked"."""
        return self.keys + self.values + self.noise + 2

    @property
    def convolution(self) -> int:
        """3 where a position must know the symbol before it."""
        return 1 if self.form == "stacked" else 3

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """See `Task`."""
        width = 1 if self.form == "stacked" else 2
        written = self.pairs + self.overwritten
        slots = self.length // width
        first = self.lead // width
        # The first event of each row is a pair, so that every question has an answer.
        chosen = first + distinct(size, written + self.questions, slots - first, generator).sort(-1).values
        is_pair = torch.ones(size, written + self.questions, dtype=torch.bool)
        asked = 1 + distinct(size, self.questions, written + self.questions - 1, generator)
        is_pair.scatter_(-1, asked, False)

        key_of_pair = distinct(size, self.pairs, self.keys, generator)
        again = key_of_pair.gather(-1, distinct(size, self.overwritten, self.pairs, generator))
        key_of_pair = torch.cat([key_of_pair, again], -1)
        key_of_pair = key_of_pair.gather(-1, distinct(size, written, written, generator))
        value_of_pair = torch.randint(self.values, (size, written), generator=generator)

        number = is_pair.long().cumsum(-1)  # pairs up to each event
        picked = (torch.rand(number.shape, generator=generator) * number).long()
        key = torch.where(is_pair, key_of_pair.gather(-1, number - 1), key_of_pair.gather(-1, picked))
        # The newest pair before a question that has its key.
        at = torch.arange(number.shape[-1])
        answers = (key[:, :, None] == key[:, None, :]) & is_pair[:, None, :] & (at[None, :] <= at[:, None])
        newest = torch.where(answers, at, -1).amax(-1)
        value = value_of_pair.gather(-1, (number.gather(-1, newest) - 1))
        distance = (chosen - chosen.gather(-1, newest)) * width
        return self._laid_out(chosen, is_pair, key, value, distance, generator)

    def pairs_and_noise(self, symbols: Tensor) -> tuple[Tensor, Tensor]:
        """Two masks [B, N] of a batch's symbols: positions with the value of a pair, and positions of noise."""
        first, last = symbols[..., 0], symbols[..., -1]
        is_pair = (last >= self.keys) & (last < self.keys + self.values)
        return is_pair, (first >= self.keys + self.values) & (first < self.symbols - 2)

    def _laid_out(
        self, slot: Tensor, is_pair: Tensor, key: Tensor, value: Tensor, distance: Tensor, generator: torch.Generator
    ) -> Batch:
        """The events [B, E] at their slots, noise elsewhere.  Symbols: keys, values, noise, none, asked."""
        size = slot.shape[0]
        none, asked = self.symbols - 2, self.symbols - 1
        value = value + self.keys
        noise = self.keys + self.values + torch.randint(self.noise, (size, self.length), generator=generator)
        targets = torch.full((size, self.length), IGNORED)
        far = torch.zeros(size, self.length, dtype=torch.int64)
        if self.form == "stacked":
            second = torch.full_like(noise, none).scatter(-1, slot, torch.where(is_pair, value, asked))
            symbols = torch.stack([noise.scatter(-1, slot, key), second], -1)
            at = slot
        else:
            at = 2 * slot
            # After a question's key comes noise, so that the answer is nowhere but in the pair.
            follows = torch.where(is_pair, value, noise.gather(-1, at + 1))
            symbols = noise.scatter(-1, at, key).scatter(-1, at + 1, follows)[..., None]
        return Batch(
            symbols,
            targets.scatter(-1, at, torch.where(is_pair, IGNORED, value)),
            far.scatter(-1, at, torch.where(is_pair, 0, distance)),
        )
