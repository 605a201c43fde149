"""The parts of texts: one calibrates, the other is measured."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from flexdma.tools.language_models import without_bars
from flexdma.tools.long_context.texts import read_texts
from flexdma.tools.refusal import RefusedError

CALIBRATION_SHARE = 3 / 4
LAST = "last quarter"


class Parts(NamedTuple):
    """Texts by name that have no passage in common.  further: those of --evaluation-text."""

    calibration: dict[str, str]
    evaluation: dict[str, str]
    further: dict[str, str]


def parts(text: list[Path], further: list[Path]) -> Parts:
    """The first three quarters of each text, to the end of a line, the rest of it, and further texts.

    Raises RefusedError for files that are not UTF-8, and for a further text that is also one of the others.
    """
    texts = read_texts(text)
    others = read_texts(further, "--evaluation-text") if further else {}
    for name, content in others.items():
        if content in texts.values():
            raise RefusedError(f"--evaluation-text: expected texts other than those of --text, got {name}")
    first, last = {}, {}
    for name, content in texts.items():
        cut = round(len(content) * CALIBRATION_SHARE)
        cut = content.find("\n", cut) + 1 or cut
        first[name], last[f"{name}, {LAST}"] = content[:cut], content[cut:]
    return Parts(first, last, others)


def sequences(tokenizer: Any, texts: dict[str, str], *, tokens: int, length: int, seed: int) -> list[Tensor]:
    """At least `tokens` tokens in sequences [1, length] of all texts in turn, two sequences at the least.

    Raises RefusedError for texts that are too short.
    """
    from flexdma.integrations.transformers import recall_sequences

    count = max(2, math.ceil(tokens / length))
    each = math.ceil(count / len(texts))
    made = []
    for number, (name, text) in enumerate(texts.items()):
        try:
            with without_bars():  # a tokenizer warns of long texts
                made.append(list(recall_sequences(tokenizer, text, length=length, count=each, seed=seed + number)))
        except ValueError as error:
            argument, _, reason = str(error).partition(": ")
            option = "--sequence" if argument == "length" else "--text"
            raise RefusedError(f"{option}: {reason}, in the first three quarters of {name}") from error
    return [sequence for turn in zip(*made, strict=True) for sequence in turn][:count]
