"""Train the four models with the same hyperparameters, then make the table, sample, pictures and results.json."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text as RichText

from flexdma.atomic_write import atomic_write
from flexdma.tools.byte_models.attentions import KINDS
from flexdma.tools.byte_models.checkpoint import save_checkpoint
from flexdma.tools.byte_models.model import ByteModel, ModelSizes
from flexdma.tools.byte_models.text import Text, validation_windows
from flexdma.tools.demo import masks
from flexdma.tools.demo.pictures import report_figures
from flexdma.tools.demo.progress import TrainingProgress
from flexdma.tools.demo.report import Outcome, outcome_table, write_json
from flexdma.tools.demo.sampling import sample
from flexdma.tools.demo.training import Course, Hyperparameters, train, validate
from flexdma.tools.machine import machine

VALIDATION_WINDOWS = 64
DYNAMIC = ("dma", "dma-recency")  # kinds whose gates select keys, so that their sparsity can change
RECORDS = 15  # of the sparsity per training; each record runs the uncompiled model on one window
PROMPT = 256  # bytes
SHOWN = 80  # printed bytes of the prompt


def compare(options: argparse.Namespace, text: Text) -> None:
    """Train the models, print the table and a sample, and write pictures, numbers and checkpoint."""
    console = Console()
    labels = {
        "dma": "DMA (paper)",
        "dma-recency": f"DMA + {options.recency}",
        "full": "full + slope",
        "window": "window + slope",
    }
    hyperparameters = Hyperparameters(options.steps, options.context, seed=options.seed)
    models, outcomes = _train_all(options, text, hyperparameters, labels, console)
    out: Path = options.out
    save_checkpoint(out / "checkpoint", models, labels)

    console.print()
    console.print(
        outcome_table(
            outcomes,
            f"{text.name}: {len(text.training):,} training bytes; w = {options.window}, context {options.context}, "
            f"{options.steps} steps of {hyperparameters.batch * hyperparameters.context:,} bytes, seed {options.seed}",
        )
    )
    written = sample(
        models["dma-recency"],
        text.validation[: min(options.context, PROMPT)],
        options.sample,
        seed=options.seed,
    )
    console.print(
        Panel(
            RichText.assemble((written.prompt[-SHOWN:], "dim"), written.continuation),
            title=f"{labels['dma-recency']} continues validation text (dim)",
            title_align="left",
            subtitle=f"from a state of {written.state_bytes / 1024:,.0f} KiB at any length; a full cache here: "
            f"{written.full_cache_bytes / 1024:,.0f} KiB",
            subtitle_align="left",
        )
    )
    with console.status("drawing"):
        figures, tiles = report_figures(
            text.validation,
            models,
            outcomes,
            window=options.window,
            context=options.context,
            stretch=options.stretch,
        )
        for name, figure in figures.items():
            atomic_write(out / f"{name}.png", lambda part, figure=figure: figure.savefig(part, dpi=110))  # type: ignore[misc]
    write_json(
        out / "results.json",
        {
            "arguments": {key: value for key, value in vars(options).items() if key != "command"} | {"out": str(out)},
            "machine": machine(options.device),
            "text": {
                "name": text.name,
                "training_bytes": len(text.training),
                "validation_bytes": len(text.validation),
                "validation_windows": len(validation_windows(text, options.context, VALIDATION_WINDOWS)),
            },
            "budget": vars(hyperparameters),
            "sizes": vars(models["dma"].sizes),
            "models": {kind: outcome.numbers() for kind, outcome in outcomes.items()},
            "tiles_visited": tiles,
            "sample": written._asdict(),
        },
    )
    console.print(
        f"Pictures, results.json and checkpoint/ are in {out}/: {', '.join(f'{name}.png' for name in figures)}\n"
        f"To see the keys that each query keeps: python -m flexdma view --text FILE --checkpoint {out / 'checkpoint'}",
        soft_wrap=True,
        markup=False,
    )


def _train_all(
    options: argparse.Namespace, text: Text, hyperparameters: Hyperparameters, labels: dict[str, str], console: Console
) -> tuple[dict[str, ByteModel], dict[str, Outcome]]:
    models, outcomes = {}, {}
    sizes = ModelSizes(window=options.window)
    windows = validation_windows(text, options.context, VALIDATION_WINDOWS)
    compiled = not options.no_compile
    with TrainingProgress(console, models=len(KINDS), steps=options.steps, compiled=compiled) as progress:
        for kind in KINDS:
            # So that each model compiles from scratch, as it would alone.
            torch.compiler.reset()
            progress.begin(labels[kind])
            model = ByteModel(kind, sizes, recency=options.recency, seed=options.seed).to(options.device)
            every = max(1, options.steps // RECORDS)
            watchers: list[Callable[[Course], None]] = [progress.step]
            if kind in DYNAMIC:
                watchers.append(masks.SparsityRecord(model, windows[:1], options.steps, every))
            course = train(model, text, hyperparameters, compiled=compiled, watchers=watchers)
            bits = validate(model, windows)
            progress.end(labels[kind], course, bits)
            models[kind] = model
            outcomes[kind] = Outcome(
                label=labels[kind],
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                course=course,
                bits_per_byte=bits,
                visible_keys=masks.visible_keys_per_query(model, windows),
            )
    return models, outcomes
