"""Numbers that JSON does not have, as strings: "NaN", "Infinity" and "-Infinity"."""

import json
from typing import Any

WORDS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def with_words(value: Any) -> Any:
    """What JSON reads back of the value, with words for numbers that are not finite."""
    return json.loads(json.dumps(value), parse_constant=str)


def with_numbers(value: Any) -> Any:
    """The inverse of `with_words`."""
    if isinstance(value, dict):
        return {name: with_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [with_numbers(each) for each in value]
    return WORDS.get(value, value) if isinstance(value, str) else value
