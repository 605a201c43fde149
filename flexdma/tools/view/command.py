"""python -m flexdma view: write the page."""

import argparse
from pathlib import Path

from flexdma.atomic_write import atomic_write
from flexdma.tools import arguments as types
from flexdma.tools.byte_models.checkpoint import CheckpointError, load_checkpoint
from flexdma.tools.refusal import RefusedError
from flexdma.tools.view.page import view_page
from flexdma.tools.view.record import view_record

LONGEST = 4096  # bytes on a page, so that a browser keeps up with the mouse and full attention fits in memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--text", metavar="FILE", type=types.input_file, required=True, help="text to show, any bytes")
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        type=Path,
        required=True,
        help="folder of the models: checkpoint/ of the demo",
    )
    parser.add_argument(
        "--out", metavar="FILE", type=types.output_file, default=Path("view.html"), help="the page to write"
    )
    parser.add_argument("--start", metavar="N", type=types.natural, default=0, help="first byte shown")
    parser.add_argument(
        "--length",
        metavar="N",
        type=types.bounded(int, least=1, most=LONGEST),
        default=LONGEST,
        help=f"number of bytes shown, at most {LONGEST:,}",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page."""
    content = arguments.text.read_bytes()
    if not content:
        raise RefusedError(f"--text: expected at least one byte, got none in {arguments.text}")
    if arguments.start >= len(content):
        raise RefusedError(f"--start: expected 0 to {len(content) - 1:,}, got {arguments.start:,}")
    try:
        trained = load_checkpoint(arguments.checkpoint)
    except CheckpointError as error:
        raise RefusedError(f"--checkpoint: {error}") from error

    record = view_record(arguments.text.name, content, arguments.start, arguments.length, trained.values())
    page = view_page(record)
    atomic_write(arguments.out, lambda part: part.write_text(page, encoding="utf-8"))
    print(f"{arguments.out}: {_what_is_shown(arguments.start, len(record['tokens']), len(content))}")
    return 0


def _what_is_shown(start: int, shown: int, total: int) -> str:
    if shown == total:
        return f"all {total:,} bytes"
    return f"bytes {start:,} to {start + shown - 1:,} of {total:,} (--start and --length choose others)"
