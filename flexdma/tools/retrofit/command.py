"""python -m flexdma retrofit: calibrate, distill, save, measure, print the tables."""

import argparse
import random

import torch
from torch import Tensor

from flexdma.tools import arguments as types
from flexdma.tools.language_models import EXTRA, LanguageModel, load_language_model, why_not_converted
from flexdma.tools.long_context.report import about, print_report, write_report
from flexdma.tools.records import Results
from flexdma.tools.refusal import RefusedError, check_installed
from flexdma.tools.retrofit.conversion import calibrated_folder, distilled_folder
from flexdma.tools.retrofit.measurement import measurable, measure
from flexdma.tools.retrofit.options import add_arguments, resolved
from flexdma.tools.retrofit.record import CALIBRATED, REPORT, earlier, settings
from flexdma.tools.retrofit.texts import Parts, parts, sequences

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Do what an earlier run has not done."""
    check_installed("matplotlib", "rich", "transformers", extra=EXTRA)
    reason = why_not_converted()
    if reason is not None:
        raise RefusedError(reason)
    options = resolved(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    texts = parts(options.text, options.evaluation_text)
    chosen = settings(options, texts)
    results = earlier(options, chosen)
    loaded = _load(options.model if results is None else str(options.out), options)
    # Before the calibration, so that what cannot be measured is refused at once.
    what = measurable(loaded, texts, options) if options.evaluate else None
    if results is None:
        results = Results(about([loaded], options.device) | {"retrofit": chosen, "cases": {}, "contenders": {}})
        batches = _batches(loaded, texts, options, options.tokens, options.seed)
        calibrated_folder(loaded, batches, options, results)
        # What is measured is what was saved.
        del loaded
        loaded = _load(str(options.out), options)
    if options.distill and "distillation" not in results.about:
        # Other facts than those of the calibration, and not in the order of the text.
        batches = _batches(
            loaded, texts, options, options.distill * options.sequence, options.seed + len(texts.calibration)
        )
        random.Random(options.seed).shuffle(batches)
        distilled_folder(loaded, batches[: options.distill], options, results)
        del loaded
        loaded = _load(str(options.out), options)
    if what is None:
        write_report(options.out / REPORT, results)
    else:
        converted = [_load(str(options.out / CALIBRATED), options), loaded] if options.distill else [loaded]
        measure(what, converted, results, options)
    print_report(options.out / REPORT, results)
    print(f"{options.out} is a model folder with bounded memory.")
    return 0


def _batches(loaded: LanguageModel, texts: Parts, options: argparse.Namespace, tokens: int, seed: int) -> list[Tensor]:
    return sequences(loaded.tokenizer, texts.calibration, tokens=tokens, length=options.sequence, seed=seed)


def _load(name: str, options: argparse.Namespace) -> LanguageModel:
    from rich.console import Console

    with Console(stderr=True).status(f"loading {name}"):
        return load_language_model(name, device=options.device, dtype=types.DTYPES[options.dtype])
