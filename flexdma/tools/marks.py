"""Pages of docs/ whose tables a command makes, between two lines that mark them."""


def between(page: str, mark: str, text: str) -> str:
    """`page` with the text between the marks <!-- MARK --> and <!-- end of MARK -->, each a line, replaced by `text`.

    Raises ValueError if one is missing.
    """
    first, last = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    before, found, rest = page.partition(first)
    _, closed, after = rest.partition(last)
    if not found or not closed:
        raise ValueError(f"page: expected the lines {first.strip()!r} and {last!r}, got a page without one of them")
    return f"{before}{first}\n{text}\n{last}{after}"
