"""Files of text as tokens, and the stretches of them whose likelihood is measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexdma.tools.refusal import RefusedError

PYTHON_TOPICS = "pydoc_data.topics"


def read_texts(paths: Sequence[Path], option: str = "--text") -> dict[str, str]:
    """The contents of UTF-8 files by name; without paths the documentation that every CPython has.

    Raises RefusedError for files that are not text, and for two of the same name.
    """
    if not paths:
        from pydoc_data.topics import topics

        return {PYTHON_TOPICS: "\n\n".join(topics[name] for name in sorted(topics))}
    texts: dict[str, str] = {}
    for path in paths:
        if path.name in texts:
            raise RefusedError(f"{option}: expected files of different names, got two of the name {path.name}")
        try:
            texts[path.name] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RefusedError(f"{option}: expected UTF-8, got other bytes in {path}") from error
    return texts


def tokenized(tokenizer: Any, texts: dict[str, str], least: int, option: str = "--text") -> dict[str, Tensor]:
    """The token ids [T] of each text, without special tokens.  Raises RefusedError where T < least."""
    found = {}
    for name, text in texts.items():
        # A tokenizer warns of texts longer than the context of its model, which are cut into stretches here.
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < least:
            raise RefusedError(
                f"{option}: expected at least {least:,} tokens, as many as the longest of --lengths, got {len(ids):,} in "
                f"{name}"
            )
        found[name] = torch.tensor(ids, dtype=torch.int64)
    return found


def stretches(tokenizer: Any, ids: Tensor, length: int, count: int) -> list[Tensor]:
    """Up to `count` stretches [1, length] at equal distances, which do not overlap; each begins with the first tokens of the
    tokenizer.
    """
    first = torch.tensor(tokenizer("")["input_ids"], dtype=torch.int64)
    taken = length - len(first)
    count = min(count, len(ids) // taken)
    starts = torch.linspace(0, len(ids) - taken, count).long().tolist()
    return [torch.cat([first, ids[start : start + taken]])[None] for start in starts]
