"""A measurement as a command runs it: with a progress bar, and with its results in a folder and on the terminal."""

import importlib.metadata
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from flexdma.atomic_write import atomic_write
from flexdma.tools.language_models import LanguageModel
from flexdma.tools.long_context.contenders import Contender
from flexdma.tools.long_context.measure import Measurement
from flexdma.tools.long_context.plan import Material, Plan
from flexdma.tools.long_context.summary import Summary
from flexdma.tools.long_context.tables import as_markdown, as_rich, tables
from flexdma.tools.machine import machine
from flexdma.tools.records import Results

RECORDS = "evaluation.json"
SUITE = "evaluate"  # in the JSON, so that other results are refused
WIDTH = 140  # of tables that go to a file or a pipe
SAMPLE = 4096  # numbers of each weight that tell models apart


def about(loaded: Sequence[LanguageModel], device: str) -> dict[str, Any]:
    """Machine, versions and models, in types that JSON has."""
    versions = {}
    for name in ("transformers", "kvpress"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    models = [
        {
            "name": one.name,
            "class": type(one.model).__name__,
            "positions": getattr(one.model.config, "max_position_embeddings", None),
            "flexdma": one.choice,
            "weights": _fingerprint(one.model),
        }
        for one in loaded
    ]
    return {"suite": SUITE, "machine": machine(device) | versions, "models": models}


def _fingerprint(model: Any) -> int:
    """A number that differs for models with other weights: of the first numbers of each."""
    found = 0
    for name, weight in model.state_dict().items():
        numbers = weight.detach().flatten()[:SAMPLE].double().cpu().numpy().tobytes()
        found = zlib.crc32(numbers, zlib.crc32(name.encode(), found))
    return found


def planned(plan: Plan, texts: dict[str, Tensor]) -> dict[str, Any]:
    """What is measured, in types that JSON has."""
    return {
        "plan": {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(plan).items()},
        "texts": {name: len(ids) for name, ids in texts.items()},
    }


def measure_with_progress(
    contenders: Sequence[Contender], material: Material, plan: Plan, results: Results, out: Path
) -> None:
    """Measure, with a bar of tokens on standard error.  The folder has what was measured, also after an interruption."""
    from flexdma.tools.progress import progress_bars

    out.mkdir(parents=True, exist_ok=True)
    try:
        with progress_bars(transient=True) as bars:
            task = bars.add_task("tokens", total=material.tokens(plan.rounds) * len(contenders), note="")
            Measurement(
                contenders,
                results,
                tick=lambda note, read: bars.update(task, advance=read, note=note),
                save=lambda: write_records(out, results),
            ).run(material, plan)
    finally:
        if results.about.get("cases"):
            write_report(out, results)


def write_records(out: Path, results: Results) -> None:
    """Write the records atomically."""
    out.mkdir(parents=True, exist_ok=True)
    _write(out / RECORDS, results.to_json())


def write_report(out: Path, results: Results) -> None:
    """Write the records, index.html, tables.md, and the pictures as SVG, each atomically."""
    # Imported here, because it needs matplotlib.
    from flexdma.tools.long_context.page import page
    from flexdma.tools.long_context.pictures import pictures

    write_records(out, results)
    summary = Summary(results)
    drawn = pictures(summary)
    models = ", ".join(model["name"] for model in results.about["models"])
    texts = {
        "index.html": page(summary, drawn, f"Bounded memory in long contexts: {models}"),
        "tables.md": "\n".join(map(as_markdown, tables(summary))),
    }
    texts |= {f"{name}-{theme}.svg": svg for name, themes in drawn.items() for theme, svg in themes.items()}
    for name, text in texts.items():
        _write(out / name, text)


def print_report(out: Path, results: Results) -> None:
    """Print the tables, what failed or was skipped, and where the files are."""
    from rich.console import Console

    summary, console = Summary(results), Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for table in tables(summary):
        console.print(as_rich(table))
    for note in summary.notes():
        console.print(note, soft_wrap=True, markup=False)
    where = f"The page is {out / 'index.html'}, the records are {out / RECORDS}."
    console.print(where, soft_wrap=True, markup=False)


def _write(path: Path, text: str) -> None:
    atomic_write(path, lambda part: part.write_text(text, encoding="utf-8"))
