"""Texts of byte-level models: the first nine tenths for training, the last tenth for validation."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

VALIDATION_SHARE = 10  # one byte in ten
SHORTEST_VALIDATION = 64  # bytes, for any context, because pictures of fewer show nothing


class TextError(ValueError):
    """The text is not usable; the message is one line with the reason and the requirement."""


class Text(NamedTuple):
    """Byte values, int64 [length]; the two parts do not overlap."""

    name: str
    training: Tensor
    validation: Tensor


def load_text(path: str | None, context: int) -> Text:
    """The text of a file; for None the documentation in every CPython (`pydoc_data.topics`).

    Raises TextError if the file does not exist, or is too short for windows of `context` bytes in both parts.
    """
    name, content = _python_topics() if path is None else (path, _read(path))
    return split_text(name, content, context)


def split_text(name: str, content: bytes, context: int) -> Text:
    """These bytes as a Text.  Raises TextError where they are too few for windows of `context` bytes in both parts."""
    needed = VALIDATION_SHARE * max(context + 1, SHORTEST_VALIDATION)
    if len(content) < needed:
        raise TextError(
            f"--text: expected at least {needed:,} bytes for context {context}, a tenth of them for validation, "
            f"got {len(content):,} in {name}"
        )
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
    split = len(values) - len(values) // VALIDATION_SHARE
    return Text(name, values[:split], values[split:])


def validation_windows(text: Text, context: int, count: int) -> Tensor:
    """Up to `count` windows [count, context + 1] at equal distances in the validation text; the same on every call."""
    last = len(text.validation) - context - 1
    count = min(count, last // context + 1)
    starts = torch.linspace(0, last, count).long()
    return torch.stack([text.validation[start : start + context + 1] for start in starts.tolist()])


def training_windows(text: Text, context: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` windows [count, context + 1] from random places of the training text."""
    starts = torch.randint(len(text.training) - context, (count,), generator=generator)
    return text.training[starts[:, None] + torch.arange(context + 1)]


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise TextError(f"--text: expected a file that can be read, got {path} ({error.strerror})") from None


def _python_topics() -> tuple[str, bytes]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise TextError("--text: expected a file, because this Python lacks pydoc_data.topics, got nothing") from None
    return "pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics)).encode()
