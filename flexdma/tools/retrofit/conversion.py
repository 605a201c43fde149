"""A model and calibration sequences -> a model folder with gates, written as a whole."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from flexdma.tools.language_models import LanguageModel, without_bars
from flexdma.tools.long_context.report import write_records
from flexdma.tools.records import Results
from flexdma.tools.refusal import RefusedError
from flexdma.tools.retrofit.folder import atomic_folder
from flexdma.tools.retrofit.record import REPORT

# Arguments of `calibrate` that options set.
OPTIONS = {"batches": "--tokens", "window_size": "--budget", "recent": "--recent", "sinks": "--sinks", "far": "--far"}


def calibrated_folder(
    loaded: LanguageModel, batches: Sequence[Tensor], options: argparse.Namespace, results: Results
) -> None:
    """Calibrate the model in place, with a progress bar, and save it with tokenizer and record in `options.out`.

    Raises RefusedError naming what is wrong with the model, or the option.
    """
    from flexdma.integrations.transformers import calibrate
    from flexdma.tools.progress import progress_bars

    with without_bars(), progress_bars(transient=True) as bars:
        task = bars.add_task("calibration, tokens", total=sum(batch.numel() for batch in batches), note="")

        def ticking() -> Iterator[Tensor]:
            for batch in batches:
                yield batch
                bars.advance(task, batch.numel())

        try:
            found = calibrate(
                loaded.model, ticking(), window_size=options.window, sinks=options.sinks, recent=options.recent,
                far=options.far,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise _refusal(loaded.name, error) from error
    texts = ", ".join(results.about["retrofit"]["--text"])
    results.about["calibration"] = asdict(found) | {"texts": f"the first three quarters of {texts}"}
    atomic_folder(options.out, lambda part: _write(part, loaded, results))


def _write(folder: Path, loaded: LanguageModel, results: Results) -> None:
    with without_bars():
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    write_records(folder / REPORT, results)


def _refusal(name: str, error: Any) -> RefusedError:
    argument, _, reason = str(error).partition(": ")
    option = OPTIONS.get(argument.partition("[")[0])
    if option is not None:
        return RefusedError(f"{option}: {reason}")
    return RefusedError(f"MODEL: {name} cannot be converted (docs/transformers.md has the families): {error}")
