"""The results of the demonstration: results.json and the table on the terminal."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.table import Table

from flexdma.atomic_write import atomic_write
from flexdma.tools.demo.training import Course


@dataclass
class Outcome:
    """The numbers of one trained model."""

    label: str
    parameters: int
    course: Course
    bits_per_byte: float  # on the validation windows
    visible_keys: float  # per query, on the same

    def numbers(self) -> dict:
        """The numbers for results.json."""
        course = asdict(self.course)
        return {
            "label": self.label,
            "parameters": self.parameters,
            "validation_bits_per_byte": self.bits_per_byte,
            "visible_keys_per_query": self.visible_keys,
            "training_bits_per_byte": course.pop("losses"),
            **course,
        }


def outcome_table(outcomes: dict[str, Outcome], title: str) -> Table:
    """A table with one row per model."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("\nattention", no_wrap=True)
    for heading in ("bits\nper byte", "\ntokens/s", "visible\nkeys", "\nparameters", "\nseconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = min(outcome.bits_per_byte for outcome in outcomes.values())
    for outcome in outcomes.values():
        course = outcome.course
        table.add_row(
            outcome.label,
            f"{outcome.bits_per_byte:.3f}",
            f"{course.tokens_per_second:,.0f}",
            f"{outcome.visible_keys:.1f}",
            f"{outcome.parameters:,}",
            f"{course.compile_seconds:.0f} + {course.seconds - course.compile_seconds:.0f}",
            style="bold" if outcome.bits_per_byte == best else None,
        )
    table.caption = (
        "bits per byte of validation text; visible keys per query;\n"
        "seconds of training: the first step, which compiles, + all other steps"
    )
    return table


def write_json(path: Path, content: dict) -> None:
    """Write indented JSON atomically."""
    atomic_write(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))
