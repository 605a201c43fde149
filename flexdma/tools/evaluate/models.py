"""The models that the user names -> contenders at equal keys per head."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from flexdma.tools.evaluate.options import BUDGET
from flexdma.tools.evaluate.presses import PRESSES, presses, why_unavailable
from flexdma.tools.language_models import LanguageModel, why_not_converted
from flexdma.tools.long_context.contenders import WINDOW, Contender, as_converted, full, sinks_and_window
from flexdma.tools.refusal import RefusedError

SAMPLE = "The quick brown fox, 1234567 times:\n\tnaïve."  # tokenizers that differ differ here


class Contenders(NamedTuple):
    """The contenders, the keys per head of the bounded ones, and why others are missing."""

    measured: list[Contender]
    keys: int
    skipped: dict[str, str]


def contenders(
    loaded: Sequence[LanguageModel], budget: int | None, sinks: int, asked: Sequence[str] | None
) -> Contenders:
    """Full attention, sinks + window, each converted model, and the presses.

    budget: keys besides the sinks; None = as the converted models keep.  asked: names of presses; None = all that work here.
    Raises RefusedError where tokenizers or keys differ, where the first model cannot be converted, and where presses are
    asked for and cannot be used.
    """
    first = loaded[0]
    for other in loaded[1:]:
        if other.tokenizer(SAMPLE)["input_ids"] != first.tokenizer(SAMPLE)["input_ids"]:
            raise RefusedError(f"MODEL: expected models of one tokenizer, got {first.name} and {other.name}")
        if other.choice is None:
            raise RefusedError(f"MODEL: expected models converted by flexdma after the first, got {other.name}")
    converted: list[Contender] = []
    for one in loaded:
        if one.choice is not None:
            converted.append(as_converted(one, frozenset(done.name for done in converted)))
    keys = _keys(converted, budget, sinks)
    whole = full(first.model)
    measured, skipped = [whole], {}
    reason = why_not_converted()
    if reason is None:
        try:
            measured.append(sinks_and_window(whole.model, keys - sinks, sinks))
        except (TypeError, ValueError) as error:
            raise RefusedError(
                f"MODEL: {first.name} cannot be converted (docs/transformers.md has the families): {error}"
            ) from error
    else:
        skipped[WINDOW] = reason
    unavailable = why_unavailable()
    if unavailable is not None and asked is not None:
        raise RefusedError(f"--presses: {unavailable}")
    names = list(PRESSES) if asked is None else list(dict.fromkeys(asked))
    if unavailable is not None:
        skipped |= dict.fromkeys(names, unavailable)
        return Contenders([*measured, *converted], keys, skipped)
    working, failed = presses(whole.model, names, keys, sinks)
    return Contenders([*measured, *converted, *working], keys, skipped | failed)


def _keys(converted: Sequence[Contender], budget: int | None, sinks: int) -> int:
    """Keys per head of all bounded contenders; where windows per head have a mean that is not whole, the next number."""
    kept = {one.name: one.keys for one in converted if one.keys is not None}
    if not kept:
        return (BUDGET if budget is None else budget) + sinks
    keys = math.ceil(max(kept.values()) - 1e-9)
    if keys - min(kept.values()) >= 1:
        raise RefusedError(f"MODEL: expected converted models that keep equal numbers of keys, got {kept}")
    if budget is not None and budget + sinks != keys:
        raise RefusedError(
            f"--budget: expected {keys - sinks}, as the converted models keep {keys} keys per head and --sinks is {sinks}, "
            f"got {budget}"
        )
    if keys <= sinks:
        raise RefusedError(f"--sinks: expected fewer than the {keys} keys that the converted models keep, got {sinks}")
    return keys
