"""The table of the systems: as rows of texts, Markdown, JSON, and for a terminal."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexdma.tools.policies.measure import Visited
from flexdma.tools.policies.systems import System

HEAD = (
    "system", "selects by", "memory", "trainable", "phases", "visited / ideal, own order", "as ordered", "made by",
    "paper", "status",
)  # fmt: skip
SHORT_HEAD = ("system", "selects by", "memory", "trainable", "own order", "ordered", "status")
PICTURES = "masks"  # the folder of the pictures, beside the page
PICTURE_WIDTH = 96
Measured = Mapping[str, Visited]  # by the names of systems


def as_record(system: System, measured: Measured) -> dict[str, Any]:
    """The row as JSON; ratios that are not measured are None."""
    visited = measured.get(system.name)
    return {
        "system": system.name,
        "selects_by": system.selects_by,
        "bounded": system.bounded,
        "trainable": system.trainable,
        "phases": list(system.phases),
        "visited_over_ideal": visited and visited.own_order,
        "visited_over_ideal_ordered": visited and visited.packed,
        "functions": list(system.functions),
        "paper": system.paper,
        "status": system.status,
        "why": system.why,
    }


def fixed_cells(system: System) -> list[str]:
    """The cells that need no measurement: system, selects by, memory, trainable, phases."""
    bounded, trainable = "bounded" if system.bounded else "grows", "yes" if system.trainable else "no"
    return [system.name, system.selects_by, bounded, trainable, ", ".join(system.phases)]


def made_by(system: System) -> list[str]:
    """The names by which its functions are imported."""
    return [name.replace(":", ".") for name in system.functions]


def status(system: System) -> str:
    """Status, and what the functions do not do."""
    return "; ".join(text for text in (system.status, system.why) if text)


def as_markdown(systems: Sequence[System], measured: Measured, pictures: Mapping[str, str], folder: Path) -> str:
    """A Markdown table for a page in this folder.

    pictures: name of a system -> path of its picture from the page.  Names link to descriptions that the folder has.
    """
    lines = ["| mask | " + " | ".join(HEAD) + " |", "|" + " --- |" * (len(HEAD) + 1)]
    for system in systems:
        path = pictures.get(system.name)
        picture = f'<img src="{path}" width="{PICTURE_WIDTH}" alt="Mask of {system.name}">' if path else ""
        paper = f"[{system.paper}](https://arxiv.org/abs/{system.paper})" if system.paper else ""
        functions = ", ".join(f"`{name}`" for name in made_by(system))
        name, *fixed = fixed_cells(system)
        if system.described and (folder / system.described).exists():
            name = f"[{name}]({system.described})"
        cells = [picture, name, *fixed, *_ratios(system, measured), functions, paper, status(system)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def as_rich(systems: Sequence[System], measured: Measured) -> Any:
    """A table of rich: a row for each system, or all fields of one below each other."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=len(systems) > 1)
    if len(systems) == 1:
        for name, value in as_record(systems[0], measured).items():
            table.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
        return table
    for name in SHORT_HEAD:
        table.add_column(name, no_wrap=name == "system")
    for system in systems:
        cells = fixed_cells(system)[:4]
        table.add_row(*cells, *_ratios(system, measured), "open" if system.missing else "complete")
    return table


def _ratios(system: System, measured: Measured) -> list[str]:
    visited = measured.get(system.name)
    return [f"{ratio:.2f}" if ratio is not None else "" for ratio in visited or (None, None)]
