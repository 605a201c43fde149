"""Numbers that JSON does not have, as strings: "NaN", "Infinity" and "-Infinity"."""

import json
from math import isfinite
from typing import Any

WORDS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def with_words(value: Any) -> Any:
    """Dictionaries, lists and tuples as they are, with words for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: with_words(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [with_words(each) for each in value]
    return value if not isinstance(value, float) or isfinite(value) else json.dumps(value)


def with_numbers(value: Any) -> Any:
    """The inverse of `with_words`."""
    if isinstance(value, dict):
        return {name: with_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [with_numbers(each) for each in value]
    return WORDS.get(value, value) if isinstance(value, str) else value
