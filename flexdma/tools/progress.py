"""Progress bars, alike in all commands.  Needs rich: import it where a bar is shown."""

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bars(console: Console | None = None, **options: Any) -> Progress:
    """A line per task: its description, how much of it is done, seconds spent and left, and its field `note`.

    console: None: standard error, so that what a command prints stays clean.  options: those of rich's Progress.
    """
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    return Progress(*columns, console=console or Console(stderr=True), **options)
