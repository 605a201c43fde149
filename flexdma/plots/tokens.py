"""Tokens in a form that matplotlib can draw."""

from functools import cache

from matplotlib.font_manager import findfont, get_font

MISSING = "□"


def drawable(token: str) -> str:
    """The token with a box for each character that the font lacks, and with `$` escaped."""
    known = "".join(c if c.isprintable() and _in_font(c) else MISSING for c in token)
    return known.replace("$", r"\$")


@cache
def _in_font(character: str) -> bool:
    return get_font(findfont("DejaVu Sans Mono")).get_char_index(ord(character)) != 0
