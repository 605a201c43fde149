"""Byte-level language modelling: the next byte of real text."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexdma.tools.byte_models.text import Text, TextError, training_windows, validation_windows
from flexdma.tools.experiments.tasks.corpora import corpus, digest
from flexdma.tools.experiments.tasks.task import Batch


@dataclass(frozen=True)
class Language:
    """Windows of a text.  Every position asks for the next byte; held-out windows are of the text's last tenth.

    text: one of CORPORA, or a file.  digest: of the text's bytes; "" = of any text of this name.

    No position is far, as no single position has the answer.
    """

    length: int = 512
    text: str = "python"
    digest: str = ""

    @property
    def symbols(self) -> int:
        """All bytes."""
        return 256

    @property
    def convolution(self) -> int:
        """None, as in language models."""
        return 1

    @property
    def rotary(self) -> bool:
        """See `Task`."""
        return True

    def with_digest(self) -> "Language":
        """The same, for this text alone.  Raises TextError where it cannot be read or is too short."""
        return replace(self, digest=digest(self.text, self.length))

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """See `Task`."""
        return _as_batch(training_windows(self._read(), self.length, size, generator))

    def held_out(self, size: int) -> Batch:
        """Up to `size` windows at equal distances."""
        return _as_batch(validation_windows(self._read(), self.length, size))

    def _read(self) -> Text:
        if self.digest not in ("", found := digest(self.text, self.length)):
            raise TextError(f"--text: expected bytes with the digest {self.digest} in {self.text}, got {found}")
        return corpus(self.text, self.length)


def _as_batch(windows: Tensor) -> Batch:
    symbols, targets = windows[:, :-1], windows[:, 1:]
    return Batch(symbols[..., None], targets, torch.zeros_like(targets))
