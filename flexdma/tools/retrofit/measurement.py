"""The converted model against full attention and a window, at equal keys."""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from flexdma.tools.language_models import LanguageModel
from flexdma.tools.long_context.contenders import as_converted, full, sinks_and_window
from flexdma.tools.long_context.plan import Material, Plan, material
from flexdma.tools.long_context.report import measure_with_progress, planned
from flexdma.tools.long_context.texts import tokenized
from flexdma.tools.records import Results
from flexdma.tools.refusal import RefusedError, refusing
from flexdma.tools.retrofit.record import REPORT, check_plan
from flexdma.tools.retrofit.texts import Parts


class Measurable(NamedTuple):
    """A plan, and the tokens for it.  texts: token ids [T] by name."""

    plan: Plan
    texts: dict[str, Tensor]
    tokens: Material


def measurable(loaded: LanguageModel, texts: Parts, options: argparse.Namespace) -> Measurable:
    """Raises RefusedError for texts and lengths that cannot be measured."""
    with refusing(ValueError):
        plan = Plan(
            tuple(sorted(set(options.lengths))), tuple(dict.fromkeys(options.kinds)), options.needles, (options.seed,),
            options.stretches, options.rounds, options.budget + options.sinks,
        )  # fmt: skip
    longest = max(plan.lengths)
    found = tokenized(loaded.tokenizer, texts.evaluation, longest)
    found |= tokenized(loaded.tokenizer, texts.further, longest, "--evaluation-text")
    try:
        return Measurable(plan, found, material(loaded.tokenizer, found, plan))
    except ValueError as error:
        raise RefusedError(f"--lengths: {str(error).removeprefix('length: ')}") from error


def measure(
    what: Measurable, converted: Sequence[LanguageModel], results: Results, options: argparse.Namespace
) -> None:
    """Add the records that `results` has not, and write the report inside the folder of the model.

    converted: the calibrated model, which has the weights of full attention, and the distilled one if there is one.
    """
    setting = planned(what.plan, what.texts)
    check_plan(results, setting["plan"], options.out)
    results.about |= setting
    whole = full(converted[0].model)
    window = sinks_and_window(whole.model, options.budget, options.sinks)
    contenders = [whole, window, *map(as_converted, converted)]
    measure_with_progress(contenders, what.tokens, what.plan, results, options.out / REPORT)
