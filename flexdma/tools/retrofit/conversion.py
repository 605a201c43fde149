"""A model and calibration sequences -> a model folder with gates, written as a whole."""

import argparse
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from flexdma.tools.language_models import LanguageModel, without_bars
from flexdma.tools.long_context.report import write_records
from flexdma.tools.records import Results
from flexdma.tools.refusal import RefusedError
from flexdma.tools.retrofit.folder import atomic_folder
from flexdma.tools.retrofit.record import CALIBRATED, REPORT

# Arguments of `calibrate` and `distill` that options set.
OPTIONS = {"batches": "--tokens", "window_size": "--budget", "recent": "--recent", "sinks": "--sinks", "far": "--far"}


def calibrated_folder(
    loaded: LanguageModel, batches: Sequence[Tensor], options: argparse.Namespace, results: Results
) -> None:
    """Calibrate the model in place, with a progress bar, and save it with tokenizer and record in `options.out`.

    Raises RefusedError naming what is wrong with the model, or the option.
    """
    from flexdma.integrations.transformers import calibrate

    with _ticking("calibration, tokens", batches) as ticking, _refusing(loaded.name):
        found = calibrate(
            loaded.model,
            ticking,
            window_size=options.window,
            sinks=options.sinks,
            recent=options.recent,
            far=options.far,
        )
    texts = ", ".join(results.about["retrofit"]["--text"])
    results.about["calibration"] = asdict(found) | {"texts": f"the first three quarters of {texts}"}
    atomic_folder(options.out, lambda part: _write(part, loaded, results))


def distilled_folder(
    loaded: LanguageModel, batches: Sequence[Tensor], options: argparse.Namespace, results: Results
) -> None:
    """Distill the calibrated model of `options.out` in place, a step for each batch, and replace the folder by the result.

    Adapters learn to use what calibrated gates keep; gates are trained where there are no adapters.
    The calibrated model's files move to the folder CALIBRATED inside it.  Raises RefusedError as `calibrated_folder`.
    """
    from flexdma.integrations.transformers import distill

    with _ticking("distillation, tokens", batches) as ticking, _refusing(loaded.name):
        found = distill(
            loaded.model,
            ticking,
            steps=len(batches),
            gates=not options.lora,
            lora=options.lora or None,
            anneal=0.0,  # calibrated windows need no other ones first
            far=options.far,
            seed=options.seed,
        )
    numbers = {name: value for name, value in vars(found).items() if name != "model"}
    results.about["distillation"] = numbers

    def write(part: Path) -> None:
        _write(part, loaded, results)
        shutil.copytree(options.out, part / CALIBRATED, copy_function=_link, ignore=shutil.ignore_patterns(REPORT))

    atomic_folder(options.out, write)


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def _ticking(title: str, batches: Sequence[Tensor]) -> Iterator[Iterable[Tensor]]:
    """The batches, with a progress bar of their tokens."""
    from flexdma.tools.progress import progress_bars

    with without_bars(), progress_bars(transient=True) as bars:
        task = bars.add_task(title, total=sum(batch.numel() for batch in batches), note="")

        def each() -> Iterator[Tensor]:
            for batch in batches:
                yield batch
                bars.advance(task, batch.numel())

        yield each()


def _write(folder: Path, loaded: LanguageModel, results: Results) -> None:
    with without_bars():
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    write_records(folder / REPORT, results)


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, FloatingPointError) as error:
        argument, _, reason = str(error).partition(": ")
        option = OPTIONS.get(argument.partition("[")[0])
        if option is not None:
            raise RefusedError(f"{option}: {reason}") from error
        raise RefusedError(
            f"MODEL: {name} cannot be converted (docs/transformers.md has the families): {error}"
        ) from error
