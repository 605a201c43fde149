"""python -m flexdma policies: the table of all systems that choose keys, measured, with a picture of each mask."""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

from flexdma.atomic_write import atomic_write
from flexdma.tools import arguments as types
from flexdma.tools.marks import between
from flexdma.tools.policies.measure import mean_visited
from flexdma.tools.policies.systems import SYSTEMS, System
from flexdma.tools.policies.tables import PICTURES, Measured, as_markdown, as_record, as_rich
from flexdma.tools.refusal import RefusedError, check_installed, refusing

MARK = "policies"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    add = parser.add_argument
    add("--system", default=None, metavar="NAME", help="one system, or those whose names contain NAME; default: all")
    add("--length", type=types.positive_int, default=4096, help="N of the gates that are measured")
    add("--window", type=types.positive_int, default=256, help="w, the keys that a query may see")
    add("--block-size", type=types.positive_int, default=64, help="queries and keys of a mask block")
    add("--json", action="store_true", help="print JSON")
    add("--out", type=types.output_folder, default=None, help="folder for policies.json, policies.md and the pictures")
    page = "a page in which to replace the table between the command's marks; pictures are written beside it"
    add("--markdown", type=types.input_file, default=None, help=page)


def run(arguments: argparse.Namespace) -> int:
    """Measure the systems, print their table, and write the requested files."""
    systems = chosen(arguments.system)
    if not arguments.json:
        check_installed("rich", extra="bench")
    if arguments.out or arguments.markdown:
        check_installed("matplotlib", extra="plot")
    with refusing(ValueError, OSError):
        page = arguments.markdown.read_text() if arguments.markdown else ""
        if page:  # refuse a page without marks before measuring
            between(page, MARK, "")
        measured = {
            system.name: mean_visited(system, arguments.length, arguments.window, arguments.block_size)
            for system in systems
            if system.example is not None and not system.missing
        }
        records = [as_record(system, measured) for system in systems]
        if arguments.out:
            _write(arguments.out / "policies.json", json.dumps(records, indent=1) + "\n")
            _write(
                arguments.out / "policies.md",
                as_markdown(systems, measured, _pictures(systems, arguments.out), arguments.out),
            )
        if page:
            folder = arguments.markdown.parent
            table = as_markdown(systems, measured, _pictures(systems, folder), folder)
            _write(arguments.markdown, between(page, MARK, table))
    _print(records, systems, measured, arguments.json)
    return 0


def chosen(name: str | None) -> list[System]:
    """The systems whose names contain `name`, in any case; one of exactly this name alone."""
    lowered = (name or "").lower()
    exact = [system for system in SYSTEMS if system.name.lower() == lowered]
    found = exact or [system for system in SYSTEMS if lowered in system.name.lower()]
    if not found:
        raise RefusedError(f"--system: expected one of {'; '.join(s.name for s in SYSTEMS)}, got {name!r}")
    return found


def _pictures(systems: list[System], folder: Path) -> dict[str, str]:
    """Draw the masks into a folder beside the page; name of a system -> path from the page."""
    from flexdma.tools.policies.pictures import draw

    pictures = folder / PICTURES
    pictures.mkdir(parents=True, exist_ok=True)
    drawn = [system for system in systems if system.example is not None and not system.missing]
    return {system.name: f"{PICTURES}/{draw(system, pictures).name}" for system in drawn}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, partial(Path.write_text, data=text))


def _print(records: list[dict[str, Any]], systems: list[System], measured: Measured, as_json: bool) -> None:
    if as_json:
        print(json.dumps(records, indent=1))
        return
    from rich.console import Console

    Console().print(as_rich(systems, measured))
