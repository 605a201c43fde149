"""Calibration texts with passages that are asked back, so that the full attention shows which keys are needed later."""

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

NAMES = (
    "Anna", "Boris", "Carla", "Diego", "Elena", "Farid", "Greta", "Hana", "Irene", "Jakob", "Keiko", "Liam", "Marta", "Nils",
    "Olga", "Pablo", "Quinn", "Rosa", "Sven", "Tara", "Ugo", "Vera", "Walt", "Xenia", "Yuri", "Zoe",
)  # fmt: skip
CITIES = (
    "Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Turin", "Kyoto", "Dublin", "Tunis", "Riga", "Bergen", "Malaga", "Porto",
)  # fmt: skip
THINGS = (
    "invoice", "parcel", "contract", "router", "license", "shipment", "booking", "report", "device", "meter", "engine",
    "camera",
)  # fmt: skip
COLOURS = ("green", "amber", "violet", "silver", "crimson", "teal", "ivory", "black", "golden")
WORDS = (
    "lantern", "pebble", "walnut", "saffron", "glacier", "cobalt", "meadow", "falcon", "orchid", "thimble", "anchor",
    "quartz",
)  # fmt: skip
MONTHS = ("January", "March", "May", "July", "August", "October")
# Statements up to their answer, and the answer.  # = a digit.
FORMS = (
    ("The {thing} of {name} has the number", "####"),
    ("The {thing} of {name} has the number", "######"),
    ("The {thing} of {name} has the number", "########"),
    ("{name} in {city} can be called at", "###-####"),
    ("The password for the {colour} {thing} is", "{word}-{other_word}"),
    ("The owner of the {colour} {thing} is", "{other_name} {last_name}son"),
    ("{name} left the {colour} {thing} in", "{other_city}"),
    ("{name} wrote on the {thing} the words", "{word} {other_word} {last_word}"),
    ("The serial of the {colour} {thing} is", "##{letter}###"),
    ("{name} returned the {thing} on", "{day} {month} {year}"),
)
TOKENS_PER_FACT = 170
# Tokens at both ends of a text without statements.
MARGIN = 16


def recall_sequences(
    tokenizer: Any, text: str, *, length: int = 4096, count: int = 5, facts: int | None = None, seed: int = 0
) -> Iterator[Tensor]:
    """Token ids [1, length] of stretches of a text, with statements inside that are asked at the end.

        text ... "The parcel of Greta has the number 4831." ... text ... "The parcel of Greta has the number 4831." ...

    tokenizer: of transformers.  text: real text, of which `count` stretches are taken at equal distances.
    length: like that of contexts to come, because gates learn what is looked back at over such distances.
    facts: None = one per 170 tokens.
    The statements are English, of ten forms (numbers, names, passwords, dates, words), with names of their own.
    A function of its arguments alone.  Raises ValueError for a text that is too short, or more facts than fit.
    """
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = tokenizer("")["input_ids"]
    facts = max(1, length // TOKENS_PER_FACT) if facts is None else facts
    for number in range(count):
        chance = random.Random(f"recall {seed}, sequence {number}")
        statements = _statements(chance, facts)
        hidden = [_ids(tokenizer, f" {statement} {answer}.") for statement, answer in statements]
        asked = chance.sample(hidden, len(hidden))
        room = length - len(first) - 2 * sum(map(len, hidden)) - 1
        if room < 2 * MARGIN + facts:
            raise ValueError(f"length: expected enough tokens for {facts} facts twice, got {length}")
        if len(ids) < room:
            raise ValueError(f"text: expected at least {room:,} tokens, got {len(ids):,}")
        start = (len(ids) - room) * number // max(1, count - 1)
        stretch = ids[start : start + room]
        places = sorted(chance.sample(range(MARGIN, room - MARGIN), facts))
        sequence, before = list(first), 0
        for place, statement in zip(places, hidden, strict=True):
            sequence += [*stretch[before:place], *statement]
            before = place
        sequence += stretch[before:] + _ids(tokenizer, "\n")[-1:]
        for statement in asked:
            sequence += statement
        yield torch.tensor(sequence)[None, :length]


def _statements(chance: random.Random, count: int) -> list[tuple[str, str]]:
    """Statements with different beginnings, so that each question has one answer."""
    made: dict[str, str] = {}
    while len(made) < count:
        statement, answer = chance.choice(FORMS)
        name, other_name, last_name = chance.sample(NAMES, 3)
        word, other_word, last_word = chance.sample(WORDS, 3)
        city, other_city = chance.sample(CITIES, 2)
        named = {
            "name": name, "other_name": other_name, "last_name": last_name, "word": word, "other_word": other_word,
            "last_word": last_word, "city": city, "other_city": other_city, "thing": chance.choice(THINGS),
            "colour": chance.choice(COLOURS), "letter": chance.choice("ABCDEFGHK"), "day": chance.randint(1, 28),
            "month": chance.choice(MONTHS), "year": chance.randint(1900, 2030),
        }  # fmt: skip
        filled = "".join(chance.choice("0123456789") if letter == "#" else letter for letter in answer)
        made[statement.format(**named)] = filled.format(**named)
    return list(made.items())


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
