"""The demonstration itself: four models, one budget; then table, sample, pictures and results.json."""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.panel import Panel
from rich.text import Text as RichText

from flexdma import Lifespans
from flexdma.demo import masks, pictures
from flexdma.demo.attentions import KINDS
from flexdma.demo.model import ByteModel, ModelSizes
from flexdma.demo.progress import TrainingProgress
from flexdma.demo.report import Outcome, machine, outcome_table, write_json, write_whole
from flexdma.demo.sampling import sample
from flexdma.demo.text import Text, validation_windows
from flexdma.demo.training import Budget, train, validate

VALIDATION_WINDOWS = 64
MASK_STRETCH = 256  # bytes in the pictures of the masks: more would be finer than a pixel
PICTURE_BLOCK = 32
PROMPT = 256
SHOWN = 80  # bytes of the prompt that are printed


def compare(options: argparse.Namespace, text: Text) -> None:
    """Train, measure, print, write."""
    console = Console()
    labels = {
        "dma": "DMA (paper)",
        "dma-recency": f"DMA + {options.recency}",
        "full": "full + slope",
        "window": "window + slope",
    }
    budget = Budget(options.steps, options.context, seed=options.seed)
    models, outcomes = _train_all(options, text, budget, labels, console)

    console.print()
    console.print(
        outcome_table(
            outcomes,
            f"{text.name}: {len(text.training):,} bytes to train on; w = {options.window}, context {options.context}, "
            f"{options.steps} steps of {budget.batch * budget.context:,} bytes, seed {options.seed}",
        )
    )
    prompt, continuation = sample(
        models["dma-recency"],
        text.validation[: min(options.context, PROMPT)],
        options.sample,
        seed=options.seed,
    )
    console.print(
        Panel(
            RichText.assemble((prompt[-SHOWN:], "dim"), continuation),
            title=f"{labels['dma-recency']} continues validation text (dim)",
            title_align="left",
        )
    )
    out = Path(options.out)
    with console.status("drawing"):
        figures, tiles = _figures(options, text, models, outcomes)
        for name, figure in figures.items():
            write_whole(out / f"{name}.png", lambda part, figure=figure: figure.savefig(part, dpi=110))  # type: ignore[misc]
    write_json(
        out / "results.json",
        {
            "arguments": {key: value for key, value in vars(options).items() if key != "command"},
            "machine": machine(torch.device(options.device)),
            "text": {
                "name": text.name,
                "training_bytes": len(text.training),
                "validation_bytes": len(text.validation),
                "validation_windows": len(validation_windows(text, options.context, VALIDATION_WINDOWS)),
            },
            "budget": vars(budget),
            "sizes": vars(models["dma"].sizes),
            "models": {kind: outcome.numbers() for kind, outcome in outcomes.items()},
            "tiles_visited": tiles,
            "sample": {"prompt": prompt, "continuation": continuation},
        },
    )
    console.print(
        f"Pictures and results.json are in {out}/: {', '.join(f'{name}.png' for name in figures)}", soft_wrap=True
    )


def _train_all(
    options: argparse.Namespace, text: Text, budget: Budget, labels: dict[str, str], console: Console
) -> tuple[dict[str, ByteModel], dict[str, Outcome]]:
    models, outcomes = {}, {}
    sizes = ModelSizes(window=options.window)
    windows = validation_windows(text, options.context, VALIDATION_WINDOWS)
    compiled = not options.no_compile
    with TrainingProgress(console, models=len(KINDS), steps=options.steps, compiled=compiled) as progress:
        for kind in KINDS:
            # Each model compiles from scratch, as it would alone.
            torch.compiler.reset()
            progress.begin(labels[kind])
            model = ByteModel(kind, sizes, recency=options.recency, seed=options.seed).to(options.device)
            course = train(model, text, budget, compiled=compiled, after_step=progress.step)
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


def _figures(
    options: argparse.Namespace, text: Text, models: dict[str, ByteModel], outcomes: dict[str, Outcome]
) -> tuple[dict[str, Figure], dict[str, dict]]:
    """The pictures by name, and the tiles that they count."""
    device = torch.device(options.device)
    long = text.validation[None, : options.stretch].to(device)
    long = long[:, : long.shape[1] // PICTURE_BLOCK * PICTURE_BLOCK]
    short = long[:, : min(MASK_STRETCH, options.context)]
    shown = {outcomes[kind].label: models[kind] for kind in ("dma", "dma-recency")}
    alive: dict[str, list[Lifespans]] = {label: masks.layer_lifespans(model, long) for label, model in shown.items()}

    tiles, counts = {}, {}
    for label, layers in alive.items():
        layer, head, maps = masks.most_scattered_head(layers, options.window, PICTURE_BLOCK)
        name = f"layer {layer + 1}, head {head + 1}"
        tiles[label] = (name, maps)
        counts[label] = {
            "head": name,
            "bytes": long.shape[1],
            "block": PICTURE_BLOCK,
            "natural": masks.visited(maps.natural),
            "packed": masks.visited(maps.packed),
        }
    return {
        "masks": pictures.mask_figure(
            {label: masks.layer_lifespans(model, short) for label, model in shown.items()}, options.window
        ),
        "blocks": pictures.block_figure(tiles, PICTURE_BLOCK, long.shape[1]),
        "lifespans": pictures.lifetime_figure(alive, options.window),
        "losses": pictures.loss_figure(
            {outcome.label: outcome.course.losses for outcome in outcomes.values()},
            {outcome.label: outcome.bits_per_byte for outcome in outcomes.values()},
            baseline=outcomes["full"].label,
        ),
    }, counts
