"""Progress bars of all commands.  Needs rich, so import it only where a bar is shown."""

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
    """Bars with one line per task: description, progress, seconds spent and left, and the task's field `note`.

    console: None = standard error, so that standard output has only results.  options: of rich's Progress; bars that vanish
    (`transient`) are shown on terminals alone, because elsewhere they leave an empty line.
    """
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    console = console or Console(stderr=True)
    hidden = bool(options.get("transient")) and not console.is_terminal
    return Progress(*columns, console=console, **{"disable": hidden, **options})
