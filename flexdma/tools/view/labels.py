"""One readable label for each token of a tokenizer of transformers, by the rules of `byte_labels`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from flexdma.tools.byte_models.labels import CONTINUATION, byte_labels, readable

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
EMPTY = "⟨⟩"
LONGEST_CHARACTER = 4  # bytes, and so tokens


class Labels(NamedTuple):
    """The labels, the positions of those that stand for the rest of a character, and of those in which a line ends."""

    tokens: list[str]
    continuations: list[int]
    line_ends: list[int]


def labels_of_bytes(content: bytes) -> Labels:
    """Labels of a text whose tokens are its bytes."""
    tokens = byte_labels(content)
    rest = [j for j, token in enumerate(tokens) if token == CONTINUATION and content[j] & 0xC0 == 0x80]
    return Labels(tokens, rest, [j for j, byte in enumerate(content) if byte == ord("\n")])


def labels_of_tokens(tokenizer: Any, ids: Sequence[int]) -> Labels:
    """Labels of token ids.

    A text is decoded token by token: what a token adds to the text of the tokens before it is its label.  Characters whose
    bytes are in several tokens stand at the first one.
    """
    labels = Labels([], [], [])
    before, start = 0, 0  # the last label that is not empty, and the one after the last
    for end in range(1, len(ids) + 1):
        known, text = _decoded(tokenizer, ids[before:start]), _decoded(tokenizer, ids[before:end])
        if text.endswith(UNFINISHED) and end - start < LONGEST_CHARACTER and end < len(ids):
            continue
        added = text[len(known) :]
        if "\n" in added:
            labels.line_ends.append(start)
        labels.tokens.append(readable(added) if added else EMPTY)
        labels.continuations.extend(range(start + 1, end))
        labels.tokens.extend([CONTINUATION] * (end - start - 1))
        # A text that begins with a space may lose it, so something stands before it.
        before, start = start if added else before, end
    return labels


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
