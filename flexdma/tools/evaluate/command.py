"""python -m flexdma evaluate: measure, print the tables, write the JSON and the page."""

import argparse
import importlib.metadata
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexdma.atomic_write import atomic_write
from flexdma.tools import arguments as types
from flexdma.tools.evaluate.join import SUITE, joined
from flexdma.tools.evaluate.models import Contenders, contenders
from flexdma.tools.evaluate.options import add_arguments, resolved
from flexdma.tools.language_models import EXTRA, LanguageModel, load_language_model
from flexdma.tools.long_context.measure import Measurement
from flexdma.tools.long_context.plan import Material, Plan, material
from flexdma.tools.long_context.summary import Summary
from flexdma.tools.long_context.tables import as_markdown, as_rich, tables
from flexdma.tools.long_context.texts import read_texts, tokenized
from flexdma.tools.machine import machine
from flexdma.tools.records import Results
from flexdma.tools.refusal import RefusedError, check_installed, refusing

WIDTH = 140  # of tables that go to a file or a pipe

__all__ = ["add_arguments", "run"]


def run(arguments: argparse.Namespace) -> int:
    """Measure, or join what was measured."""
    check_installed("matplotlib", "rich", "transformers", extra=EXTRA)
    if arguments.join is not None:
        if arguments.models:
            raise RefusedError(f"--join: expected no MODEL beside it, got {arguments.models[0]}")
        results = joined(arguments.join)
        arguments.out.mkdir(parents=True, exist_ok=True)
        _write(arguments.out, results)
        _show(arguments.out, results)
        return 0
    if not arguments.models:
        raise RefusedError("MODEL: expected a hub name, a model folder or a .gguf file, got none")
    options = resolved(arguments)
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
    results = Results(_about(options, loaded, plan, texts))
    results.add("contenders", "", [(name, "skipped", reason) for name, reason in found.skipped.items()])
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        _measure(found, tokens, plan, results, options.out)
    finally:
        # What was measured before an interruption is kept.
        if results.about.get("cases"):
            _write(options.out, results)
    _show(options.out, results)
    return 0


def _load(options: argparse.Namespace) -> list[LanguageModel]:
    from rich.console import Console

    loaded = []
    for name in options.models:
        with Console(stderr=True).status(f"loading {name}"):
            loaded.append(load_language_model(name, device=options.device, dtype=types.DTYPES[options.dtype]))
    return loaded


def _about(
    options: argparse.Namespace, loaded: list[LanguageModel], plan: Plan, texts: dict[str, Tensor]
) -> dict[str, Any]:
    versions = {}
    for name in ("transformers", "kvpress"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    numbers = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(plan).items()}
    return {
        "suite": SUITE,
        "machine": machine(options.device) | versions,
        "models": [
            {
                "name": one.name,
                "class": type(one.model).__name__,
                "positions": getattr(one.model.config, "max_position_embeddings", None),
                "flexdma": one.choice,
            }
            for one in loaded
        ],
        "dtype": options.dtype,
        "sinks": options.sinks,
        "plan": numbers,
        "texts": {name: len(ids) for name, ids in texts.items()},
    }


def _measure(found: Contenders, tokens: Material, plan: Plan, results: Results, out: Path) -> None:
    from flexdma.tools.progress import progress_bars

    with progress_bars(transient=True) as bars:
        task = bars.add_task("tokens", total=tokens.tokens(plan.rounds) * len(found.measured), note="")
        Measurement(
            found.measured,
            results,
            tick=lambda note, read: bars.update(task, advance=read, note=note),
            save=lambda: _write_json(out, results),
        ).run(tokens, plan)


def _write_json(out: Path, results: Results) -> None:
    atomic_write(out / "evaluation.json", lambda part: part.write_text(results.to_json(), encoding="utf-8"))


def _write(out: Path, results: Results) -> None:
    """The JSON, the tables as Markdown, the page, and its pictures as files."""
    # Imported here, because it needs matplotlib.
    from flexdma.tools.long_context.page import page
    from flexdma.tools.long_context.pictures import as_svg, pictures

    _write_json(out, results)
    summary = Summary(results)
    models = ", ".join(model["name"] for model in results.about["models"])
    texts = {"index.html": page(summary, f"Bounded memory in long contexts: {models}")}
    texts["tables.md"] = "\n".join(map(as_markdown, tables(summary)))
    for name, draw in pictures(summary).items():
        texts |= {f"{name}-{theme}.svg": as_svg(draw(theme)) for theme in ("light", "dark")}
    for name, text in texts.items():
        atomic_write(out / name, lambda part, text=text: part.write_text(text, encoding="utf-8"))  # type: ignore[misc]


def _show(out: Path, results: Results) -> None:
    from rich.console import Console

    summary, console = Summary(results), Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for table in tables(summary):
        console.print(as_rich(table))
    for note in summary.notes():
        console.print(note, soft_wrap=True, markup=False)
    console.print(
        f"The page is {out / 'index.html'}, the records are {out / 'evaluation.json'}.", soft_wrap=True, markup=False
    )
