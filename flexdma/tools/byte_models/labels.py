"""One readable label for each byte of a text, for pictures and pages of byte-level models.

The first byte of a character has the character as its label; its other bytes have CONTINUATION.
"""

import unicodedata

CONTINUATION = "·"
NAMED = {"\n": "↵", "\t": "⇥", "\r": "␍"}
SEQUENCE_LENGTHS = ((0b1000_0000, 0, 1), (0b1110_0000, 0b1100_0000, 2), (0b1111_0000, 0b1110_0000, 3))


def byte_labels(content: bytes) -> list[str]:
    r"""One label per byte.

    b"a\n\xc3\xa9\xff"   ->   ["a", "↵", "é", "·", "⟨FF⟩"]

    The label of a byte that is not UTF-8 is its hexadecimal code, that of a character that does not print is ⟨its code⟩.
    So no label ends a line, changes the direction of the text, or joins the label before it.
    """
    labels: list[str] = []
    while len(labels) < len(content):
        start = len(labels)
        length = _sequence_length(content[start])
        try:
            character = content[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            labels.append(f"⟨{content[start]:02X}⟩")
        else:
            labels += [readable(character)] + [CONTINUATION] * (length - 1)
    return labels


def _sequence_length(first: int) -> int:
    for mask, prefix, length in SEQUENCE_LENGTHS:
        if first & mask == prefix:
            return length
    return 4


def readable(text: str) -> str:
    """A text in which no character ends a line, changes its direction, is invisible, or joins what stands before the text."""
    shown = "".join(NAMED.get(c) or (c if c.isprintable() else f"⟨{ord(c):X}⟩") for c in text)
    return f"◌{shown}" if unicodedata.category(text[0]).startswith("M") else shown
