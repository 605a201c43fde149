"""The table of an experiment, in a terminal and as Markdown."""

from statistics import fmean

from rich import box
from rich.table import Table

from flexdma.tools.experiments.experiment import Experiment
from flexdma.tools.experiments.gate_variants import CANDIDATES
from flexdma.tools.experiments.reports.columns import columns_of, own_columns_of
from flexdma.tools.experiments.training import SOLVED

GATES = (
    "leak: accuracy in one pass less that token by token; beyond w: share of the visible keys; pair above: share of (pair, "
    "noise) in which the pair has the larger gate; pair lives: queries that see it"
)
WIDE = 6  # columns for which a terminal of 80 characters has no room with spreads


def table(experiment: Experiment) -> Table:
    """One row per mixer; those that solve the task are bold.  Many columns have means alone, and leave out rate and time."""
    result = Table(title=experiment.name, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    result.add_column("mixer", no_wrap=True)
    is_wide = len(own_columns_of(experiment)) >= WIDE
    columns = own_columns_of(experiment) if is_wide else columns_of(experiment)
    for column in columns:
        result.add_column(column.heading.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for row in experiment.rows():
        cells = [column.cell(row).split(" ±")[0] if is_wide else column.cell(row) for column in columns]
        result.add_row(row.mixer, *cells, style="bold" if fmean(row.far) >= SOLVED else None)
    what = "mean" if is_wide else "mean ± standard deviation"
    result.caption = f"{what} over seeds {', '.join(map(str, experiment.seeds))}; {explained(experiment)}"
    return result


def markdown(experiment: Experiment) -> str:
    """The same, with what a query of each mixer sees."""
    columns = columns_of(experiment)
    lines = [
        f"| mixer | a query sees | {' | '.join(column.heading for column in columns)} |",
        f"|---|---|{'---:|' * len(columns)}",
    ]
    for row in experiment.rows():
        cells = [row.mixer, CANDIDATES[row.mixer].sees, *(column.cell(row) for column in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def explained(experiment: Experiment) -> str:
    """What the columns are."""
    sizes = experiment.setting["sizes"]
    if experiment.kind == "lm":
        return (
            "bits per byte of held-out text; against full: attention to all earlier keys with the same positional bias"
        )
    if experiment.kind == "niah":
        return "accuracy of digits by length, and KiB of a layer's keys and values at the longest"
    windows = f"{sizes['layers']} layer(s) of windows of {sizes['window']}"
    far = f"far: more than {sizes['layers'] * (sizes['window'] - 1)} positions back, which {windows} cannot reach"
    return f"{far}; {GATES}" if experiment.kind == "gates" else far
