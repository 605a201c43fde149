"""python -m flexdma view: write the page."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from flexdma.atomic_write import atomic_write
from flexdma.tools import arguments as types
from flexdma.tools.byte_models.checkpoint import CheckpointError, load_checkpoint
from flexdma.tools.refusal import RefusedError, check_installed, refusing
from flexdma.tools.view.demo_models import shown_models
from flexdma.tools.view.labels import labels_of_bytes
from flexdma.tools.view.page import view_page
from flexdma.tools.view.record import LONGEST, ShownModel, ShownText, bytes_of_page, view_record

DEFAULT = 512  # tokens of a converted model
MEGABYTE = 1_000_000
LARGEST = 64 * MEGABYTE  # bytes of a page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--text", metavar="FILE", type=types.input_file, required=True, help="text to show")
    models = parser.add_mutually_exclusive_group(required=True)
    models.add_argument(
        "--model", metavar="DIR", type=Path, help="folder of a converted model of transformers with its tokenizer"
    )
    models.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=Path,
        help="folder of the demo's models, checkpoint/, whose tokens are bytes",
    )
    parser.add_argument(
        "--out", metavar="FILE", type=types.output_file, default=Path("view.html"), help="the page to write"
    )
    parser.add_argument("--start", metavar="N", type=types.natural, default=0, help="first token shown")
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=types.bounded(int, least=1, most=LONGEST),
        help=f"number of tokens shown, at most {LONGEST:,} (default {DEFAULT}, or {LONGEST:,} bytes with --checkpoint)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page."""
    text, models = _of_the_demo(arguments) if arguments.model is None else _of_a_converted_model(arguments)
    page = view_page(view_record(text, models))
    atomic_write(arguments.out, lambda part: part.write_text(page, encoding="utf-8"))
    print(f"{arguments.out}: {_what_is_shown(text)}, {len(page.encode()) / MEGABYTE:.1f} MB")
    return 0


def _of_the_demo(arguments: argparse.Namespace) -> tuple[ShownText, Sequence[ShownModel]]:
    content = arguments.text.read_bytes()
    if not content:
        raise RefusedError(f"--text: expected at least one byte, got none in {arguments.text}")
    if arguments.start >= len(content):
        raise RefusedError(f"--start: expected 0 to {len(content) - 1:,}, got {arguments.start:,}")
    try:
        trained = load_checkpoint(arguments.checkpoint)
    except CheckpointError as error:
        raise RefusedError(f"--checkpoint: {error}") from error
    shown = content[arguments.start : arguments.start + (arguments.tokens or LONGEST)]
    text = ShownText(arguments.text.name, "bytes", arguments.start, len(shown), len(content), labels_of_bytes(shown))
    return text, shown_models(trained.values(), shown)


def _of_a_converted_model(arguments: argparse.Namespace) -> tuple[ShownText, Sequence[ShownModel]]:
    check_installed("transformers", "rich", extra="evaluate")
    from rich.console import Console

    from flexdma.tools.progress import progress_bars
    from flexdma.tools.view.model_folder import load_converted, tokens_shown

    console = Console(stderr=True)
    with console.status(f"loading {arguments.model}"):
        loaded = load_converted(arguments.model)
        ids, text = tokens_shown(loaded.tokenizer, arguments.text, arguments.start, arguments.tokens or DEFAULT)
    # Registers an attention interface, so it imports transformers.
    from flexdma.integrations.transformers.converted import converted_layers, windows_per_head
    from flexdma.tools.view.converted import shown_model

    layers = converted_layers(loaded.model)
    with refusing(ValueError):  # models without windows
        windows = [size for layer in layers for size in windows_per_head(layer)]
    _check_size(text, ids.shape[1], windows)
    # A bar that is gone at the end leaves an empty line in a file.
    with progress_bars(console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("layers", total=2 * len(layers), note="with gates, then of full attention")
        shown = shown_model(loaded.model, ids, arguments.model.resolve().name, lambda: bars.advance(task))
    return text, [shown]


def _check_size(text: ShownText, length: int, sizes: Sequence[int]) -> None:
    """Raise RefusedError where no head with a window of these sizes drops a key, or the page is too large."""
    if length <= min(sizes):
        cause = "--text" if text.start + text.shown == text.total else "--tokens"
        raise RefusedError(
            f"{cause}: expected more tokens than the smallest window, {min(sizes):,}, so that a head drops a key, "
            f"got {length:,}"
        )
    size = bytes_of_page(len(sizes), length)
    if size > LARGEST:
        fits = int(length * LARGEST / size)
        raise RefusedError(
            f"--tokens: expected at most {fits:,} for {len(sizes)} KV heads in all layers, a page of "
            f"{LARGEST // MEGABYTE} MB, got {length:,}"
        )


def _what_is_shown(text: ShownText) -> str:
    if text.shown == text.total:
        return f"all {text.total:,} {text.unit}"
    last = text.start + text.shown - 1
    return f"{text.unit} {text.start:,} to {last:,} of {text.total:,} (--start and --tokens choose others)"
