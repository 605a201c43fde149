"""Griffe extension: the docstrings of this project as Markdown.

A docstring here is prose.  An argument or field is a line `name: text` at the margin, continued by indented lines; a package
lists its names as `name    text`; examples are indented.  Markdown would join such lines into one paragraph.  Each becomes a
list item here, and each example a fenced block.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

LISTED = re.compile(r"([\w/]+(?:\.\w+)*(?:, (?:\w+|\.\.\.))*) {2,}(\S.*)")


class PlainDocstrings(griffe.Extension):
    """Rewrites each docstring once its package is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value, names_of(obj))


def names_of(obj: griffe.Object) -> set[str]:
    """The arguments of a function; the arguments and fields of a class."""
    names = {parameter.name for parameter in getattr(obj, "parameters", ())}
    return names | {name for name, member in obj.members.items() if not member.is_alias and member.is_attribute}


def markdown(docstring: str, names: set[str]) -> str:
    """The docstring with its items and examples marked; `names` may begin an item."""
    lines: list[str] = []
    inside = "text"
    for line in docstring.splitlines():
        before = lines[-1] if lines else ""
        indented = line.startswith("    ")
        if inside == "example" and line and not indented:
            # The blank line above belongs behind the example.
            lines[-1:] = ["```", ""]
            inside = "text"
        if inside == "example":
            lines.append(line[4:])
        elif indented and not before:
            lines += ["```text", line[4:]]
            inside = "example"
        elif found := items(line, names):
            lines += [""] if inside == "text" and before else []
            lines += [f"- `{name}`: {text}" for name, text in found]
            inside = "items"
        elif line and not indented and (inside == "text" or before[-1:] in ("", ".", ":")):
            lines += ["", line] if inside == "items" and before else [line]
            inside = "text"
        else:
            lines.append(line)
    return "\n".join([*lines, "```"] if inside == "example" else lines)


def items(line: str, names: set[str]) -> list[tuple[str, str]]:
    """(names, text) of each item of a line: `dtype: of the keys.  device: where they are.` has two."""
    if listed := LISTED.fullmatch(line):
        return [(listed[1], listed[2])]
    found: list[tuple[str, str]] = []
    for part in line.split(".  "):
        head, colon, text = part.partition(": ")
        bare = re.sub(r" ?(\[[^]]*\]|\([^)]*\))", "", head)
        if colon and {name.strip() for name in bare.split(",")} <= names:
            found.append((head, text))
        elif found:
            found[-1] = (found[-1][0], f"{found[-1][1]}.  {part}")
        else:
            return []
    # The split took the full stop of all but the last.
    return [(name, text + "." * (place < len(found) - 1)) for place, (name, text) in enumerate(found)]
