"""python -m flexdma evaluate: measure, print the tables, write the JSON and the page."""

import argparse

import torch

from flexdma.tools import arguments as types
from flexdma.tools.evaluate.join import joined
from flexdma.tools.evaluate.models import contenders
from flexdma.tools.evaluate.options import SIZES, add_arguments
from flexdma.tools.evaluate.resume import resumed
from flexdma.tools.language_models import EXTRA, LanguageModel, load_language_model
from flexdma.tools.long_context.measure import token_cases
from flexdma.tools.long_context.options import resolved
from flexdma.tools.long_context.plan import Plan, material
from flexdma.tools.long_context.report import about, measure_with_progress, planned, print_report, write_report
from flexdma.tools.long_context.texts import read_texts, tokenized
from flexdma.tools.records import Results
from flexdma.tools.refusal import RefusedError, check_installed, refusing

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Measure, or join what was measured."""
    check_installed("matplotlib", "rich", "transformers", extra=EXTRA)
    if arguments.join is not None:
        if arguments.models:
            raise RefusedError(f"--join: expected no MODEL beside it, got {arguments.models[0]}")
        if arguments.resume:
            raise RefusedError("--join: expected no --resume beside it, got both")
        results = joined(arguments.join)
        write_report(arguments.out, results)
        print_report(arguments.out, results)
        return 0
    if not arguments.models:
        raise RefusedError("MODEL: expected a hub name, a model folder or a .gguf file, got none")
    options = resolved(arguments, SIZES)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    contents = read_texts(options.text)
    loaded = _load(options)
    found = contenders(loaded, options.budget, options.sinks, options.presses)
    with refusing(ValueError):
        plan = Plan(
            tuple(sorted(set(options.lengths))), tuple(dict.fromkeys(options.kinds)), options.needles,
            tuple(dict.fromkeys(options.seed)), options.stretches, options.rounds, found.keys,
        )  # fmt: skip
    texts = tokenized(loaded[0].tokenizer, contents, max(plan.lengths))
    try:
        tokens = material(loaded[0].tokenizer, texts, plan)
    except ValueError as error:
        raise RefusedError(f"--lengths: {str(error).removeprefix('length: ')}") from error
    setting = about(loaded, options.device) | planned(plan, texts) | {"dtype": options.dtype, "sinks": options.sinks}
    earlier = resumed(options.out, setting, token_cases(tokens, plan.keys)) if options.resume else None
    results = Results(setting) if earlier is None else earlier
    measured = results.about.get("contenders", {})
    skipped = [(name, "skipped", reason) for name, reason in found.skipped.items() if name not in measured]
    results.add("contenders", "", skipped)
    measure_with_progress(found.measured, tokens, plan, results, options.out)
    print_report(options.out, results)
    return 0


def _load(options: argparse.Namespace) -> list[LanguageModel]:
    from rich.console import Console

    loaded = []
    for name in options.models:
        with Console(stderr=True).status(f"loading {name}"):
            loaded.append(load_language_model(name, device=options.device, dtype=types.DTYPES[options.dtype]))
    return loaded
