"""Train one model, DMA with a recency, over the ranks that torchrun started; rank 0 shows progress and writes files."""

import argparse
import zlib
from pathlib import Path

import torch
from rich.console import Console

from flexdma.tools.byte_models.checkpoint import save_checkpoint
from flexdma.tools.byte_models.model import ByteModel, ModelSizes
from flexdma.tools.byte_models.text import Text, validation_windows
from flexdma.tools.demo.divided_model import divide, whole_weights
from flexdma.tools.demo.progress import TrainingProgress
from flexdma.tools.demo.ranks import division_of, joined
from flexdma.tools.demo.report import write_json
from flexdma.tools.demo.resumable import ShardedCheckpoints
from flexdma.tools.demo.training import Hyperparameters, train, validate
from flexdma.tools.machine import machine

KIND = "dma-recency"
VALIDATION_WINDOWS = 64


def train_divided(options: argparse.Namespace, text: Text) -> None:
    """Train, and write checkpoint/ and results.json; training/ has what --resume goes on from."""
    label = f"DMA + {options.recency}"
    hyperparameters = Hyperparameters(options.steps, options.context, seed=options.seed)
    sizes, out = ModelSizes(window=options.window), Path(options.out)
    settings = {name: getattr(options, name) for name in ("steps", "context", "window", "recency", "seed")}
    settings["text"] = f"{len(text.training)} bytes, crc32 {zlib.crc32(bytes(text.training.to(torch.uint8).tolist()))}"
    checkpoints = ShardedCheckpoints(
        out / "training", steps=options.steps, every=options.save_every, settings=settings, resume=options.resume
    )
    torch.use_deterministic_algorithms(options.deterministic)
    with joined(division_of(options), options.device, options.timeout) as ranks:
        console = Console(quiet=ranks.rank != 0)
        model = ByteModel(KIND, sizes, recency=options.recency, seed=options.seed).to(ranks.device)
        divide(model, ranks, backend=None if options.no_compile else "inductor")
        with TrainingProgress(console, models=1, steps=options.steps, compiled=not options.no_compile) as progress:
            progress.begin(label)
            # The blocks are compiled already.
            course = train(
                model,
                text,
                hyperparameters,
                compiled=False,
                watchers=[progress.step],
                share=ranks,
                checkpoints=checkpoints,
            )
            windows = validation_windows(text, options.context, VALIDATION_WINDOWS)
            bits = validate(model, windows, share=ranks)
            progress.end(label, course, bits)
        weights = whole_weights(model)
        if ranks.rank:
            return
        whole = ByteModel(KIND, sizes, recency=options.recency, seed=options.seed)
        whole.load_state_dict(weights)
        save_checkpoint(out / "checkpoint", {KIND: whole}, {KIND: label})
        write_json(
            out / "results.json",
            {
                "arguments": {key: value for key, value in vars(options).items() if key != "command"}
                | {"out": str(out)},
                "machine": machine(options.device),
                "ranks": vars(ranks.division),
                "text": settings["text"],
                "validation_bits_per_byte": bits,
                "training_bits_per_byte": course.losses,
                "tokens_per_second": course.tokens_per_second,
            },
        )
        console.print(f"results.json, checkpoint/ and training/ are in {out}/", soft_wrap=True, markup=False)
