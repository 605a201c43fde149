"""Needles: numbers hidden in a long context, and the question for them.

A needle is a function of its arguments alone, seed included.  Lengths are in tokens of the tokenizer.

    context      first tokens, text ... "The badge number of Ada Marsh is 4831907." ... text
    question     "The badge number of Ada Marsh is"
    answer       " 4831907"

kinds:
    pass key     five digits in repeated filler
    digits       seven digits in real text
    keys         four facts in real text, of the same form and about four keys, of which one is asked
    values       three facts in real text about one key, which are asked one after the other
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexdma.tools.long_context.wordings import EVALUATION, Wording, Wordings

KINDS = {"pass key": 1, "digits": 1, "keys": 4, "values": 3}  # kind: number of hidden statements
PASS_KEY_DIGITS, DIGITS = 5, 7
SHALLOWEST, DEEPEST = 0.05, 0.95
# Tokens before and after a place among which a statement looks for the end of a line or sentence.
REACH = 32


@dataclass(frozen=True)
class Needle:
    """A context, a question and its answer, as tokens.

    context [n], question [q], answer [a], int64, with n + q = length.
    scored [a], bool: the tokens of the answer that contain digits of values; the others (with the kind "values") are the
        questions between the values.
    depth: where the first asked statement is in the context, 0 to 1.  statements: all hidden ones, in order.
    """

    kind: str
    length: int
    depth: float
    seed: int
    context: Tensor
    question: Tensor
    answer: Tensor
    scored: Tensor
    statements: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def ids(self) -> Tensor:
        """Context, question and answer [1, n + q + a]."""
        return torch.cat([self.context, self.question, self.answer])[None]


def depths(count: int) -> list[float]:
    """`count` depths at equal distances, from SHALLOWEST to DEEPEST; the middle for one."""
    if count == 1:
        return [0.5]
    return [round(SHALLOWEST + (DEEPEST - SHALLOWEST) * number / (count - 1), 4) for number in range(count)]


def needles(
    tokenizer: Any,
    texts: Sequence[Tensor],
    *,
    kinds: Sequence[str],
    lengths: Sequence[int],
    depths: Sequence[float],
    seeds: Sequence[int],
    wordings: Wordings = EVALUATION,
) -> Iterator[Needle]:
    """A needle for every combination of seed, length, kind and depth.  Arguments as for `make_needle`."""
    for seed in seeds:
        for length in lengths:
            for kind in kinds:
                for depth in depths:
                    yield make_needle(
                        tokenizer, texts, kind=kind, length=length, depth=depth, seed=seed, wordings=wordings
                    )


def make_needle(
    tokenizer: Any,
    texts: Sequence[Tensor],
    *,
    kind: str,
    length: int,
    depth: float,
    seed: int,
    wordings: Wordings = EVALUATION,
) -> Needle:
    """The needle of this kind, length, depth and seed.

    tokenizer: a fast one of transformers.  texts: token ids [T] each, of which the seed chooses one and a stretch of it.
    length: tokens of context and question together.  depth: 0 to 1; the statement is put at the nearest end of a line or
    sentence.
    Raises ValueError for unknown kinds, for lengths that leave no text around the statements, and for texts that are shorter
    than the context.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth: expected 0 to 1, got {depth}")
    # A text as the seed: the same numbers in every process and version of Python.
    chance = random.Random(f"{kind}, {length} tokens, depth {depth}, seed {seed}")
    facts = _facts(kind, wordings, chance)
    asked = facts[:3] if kind == "values" else facts[:1]
    question, answer, scored = _asked(tokenizer, asked)
    hidden = [_ids(tokenizer, f"\n{statement}\n") for statement, _, _ in facts]
    first = torch.tensor(tokenizer("")["input_ids"], dtype=torch.int64)
    room = length - len(first) - len(question) - sum(map(len, hidden))
    least = 2 * REACH * len(facts)
    if room < least:
        raise ValueError(
            f"length: expected at least {length - room + least} tokens for a needle of the kind {kind!r}, got {length}"
        )
    text = _filler(tokenizer, wordings, room) if kind == "pass key" else _stretch(texts, room, chance)
    places = _places(tokenizer, text, depth, len(facts), chance)
    context, order = first, sorted(range(len(facts)), key=lambda number: places[number])
    before = 0
    for number in order:
        context = torch.cat([context, text[before : places[number]], hidden[number]])
        before = places[number]
    return Needle(
        kind, length, depth, seed, torch.cat([context, text[before:]]), question, answer, scored,
        tuple(facts[number][0] for number in order), tuple(value for _, _, value in asked),
    )  # fmt: skip


def _facts(kind: str, wordings: Wordings, chance: random.Random) -> list[tuple[str, str, str]]:
    """(statement, question, value), the asked ones first."""

    def fact(wording: Wording, digits: int, **names: str) -> tuple[str, str, str]:
        value = str(chance.randrange(10 ** (digits - 1), 10**digits))
        return wording.statement.format(value=value, **names), wording.question.format(**names), value

    if kind == "pass key":
        return [fact(chance.choice(wordings.pass_keys), PASS_KEY_DIGITS)]
    wording = chance.choice(wordings.facts)
    keys, fields = (chance.sample(names, KINDS[kind]) for names in (wordings.keys, wordings.fields))
    if kind == "values":
        keys = keys[:1] * KINDS[kind]
    else:
        fields = fields[:1] * KINDS[kind]
    return [fact(wording, DIGITS, key=key, field=field) for key, field in zip(keys, fields, strict=True)]


def _asked(tokenizer: Any, asked: Sequence[tuple[str, str, str]]) -> tuple[Tensor, Tensor, Tensor]:
    """Question, answer and scored tokens.  One text is tokenized, so that the answer has the tokens of running text."""
    text, spans = "", []
    for _, question, value in asked:
        text += f".\n{question} " if text else f"\n\n{question} "
        spans.append((len(text), len(text) + len(value)))
        text += value
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer: expected a fast one, which has offsets, got {type(tokenizer).__name__}")
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    in_value = torch.tensor(
        [any(begin < stop and end > start for start, stop in spans) for begin, end in coded["offset_mapping"]]
    )
    ids = torch.tensor(coded["input_ids"])
    start = int(in_value.int().argmax())
    return ids[:start], ids[start:], in_value[start:]


def _filler(tokenizer: Any, wordings: Wordings, room: int) -> Tensor:
    """`room` tokens of repeated filler."""
    once = " ".join(wordings.filler) + " "
    repeats = 2
    while len(ids := _ids(tokenizer, once * repeats)) < room:
        repeats *= 2
    return ids[:room]


def _stretch(texts: Sequence[Tensor], room: int, chance: random.Random) -> Tensor:
    """`room` tokens of one of the texts that are long enough."""
    long = [text for text in texts if len(text) >= room]
    if not long:
        longest = max((len(text) for text in texts), default=0)
        raise ValueError(f"texts: expected one of at least {room:,} tokens, got {longest:,} at most")
    text = chance.choice(long)
    start = chance.randrange(len(text) - room + 1)
    return text[start : start + room]


def _places(tokenizer: Any, text: Tensor, depth: float, count: int, chance: random.Random) -> list[int]:
    """Where in the text each statement begins; the first at `depth`, the others elsewhere."""
    others = [place for place in depths(10) if abs(place - depth) >= 0.05]
    chosen = [depth, *chance.sample(others, count - 1)]
    return [_sentence_end(tokenizer, text, round(share * len(text))) for share in chosen]


def _sentence_end(tokenizer: Any, text: Tensor, place: int) -> int:
    """The position nearest to `place`, within REACH, at which a line or sentence has ended; `place` if there is none."""
    near = range(max(1, place - REACH), min(len(text), place + REACH) + 1)
    for position in sorted(near, key=lambda position: abs(position - place)):
        if tokenizer.decode([int(text[position - 1])]).rstrip(" ").endswith(("\n", ".", "!", "?")):
            return position
    return place


def _ids(tokenizer: Any, text: str) -> Tensor:
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
