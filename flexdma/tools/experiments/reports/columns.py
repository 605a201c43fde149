"""The columns of an experiment's table, which depend on the kind of its task."""

from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

from flexdma.tools.experiments.experiment import Experiment, Row, mean_and_spread
from flexdma.tools.experiments.training import SOLVED

NONE = "-"
FULL = {"slope": "full + slope", "forget": "FoX"}  # all earlier keys with the same positional bias


class Column(NamedTuple):
    """A heading, and the cell of a row."""

    heading: str
    cell: Callable[[Row], str]


def columns_of(experiment: Experiment) -> list[Column]:
    """Those of its kind, then those of all."""
    return [
        *own_columns_of(experiment),
        Column("best rate", lambda row: f"{row.rate:g}"),
        Column("seconds", lambda row: f"{fmean(outcome.seconds for outcome in row.outcomes):.0f}"),
    ]


def own_columns_of(experiment: Experiment) -> list[Column]:
    """Those of its kind."""
    by_kind = {"lm": _language, "niah": _needles, "gates": _gates}
    return by_kind.get(experiment.kind, _recall)(experiment)


def steps_to_solve(row: Row) -> str:
    """The mean over seeds that solved the task, with their number where others did not."""
    if not row.solved:
        return NONE
    some = "" if len(row.solved) == len(row.outcomes) else f" ({len(row.solved)} of {len(row.outcomes)})"
    return f"{round(fmean(row.solved))}{some}"


def kilobytes(row: Row, index: int = -1) -> str:
    """KiB of keys and values of a layer at one of the probe's lengths."""
    kept = row.probed("kept")[0][index]
    return NONE if kept is None else f"{kept / 1024:,.0f}"


def _recall(experiment: Experiment) -> list[Column]:
    return [
        Column("far", lambda row: mean_and_spread(row.far)),
        Column("near", lambda row: mean_and_spread(row.near)),
        Column(f"steps to {SOLVED:g}", steps_to_solve),
    ]


def _language(experiment: Experiment) -> list[Column]:
    def relative(row: Row) -> str:
        name = next((full for bias, full in FULL.items() if row.mixer.endswith(bias) or row.mixer == full), "full")
        baseline = experiment.row(name)
        return NONE if baseline is None else f"{fmean(row.bits) / fmean(baseline.bits) - 1:+.1%}"

    return [
        Column("bits per byte", lambda row: mean_and_spread(row.bits)),
        Column("against full", relative),
        Column("parameters", lambda row: f"{row.outcomes[0].parameters:,}"),
    ]


def _needles(experiment: Experiment) -> list[Column]:
    def at(index: int) -> Callable[[Row], str]:
        return lambda row: mean_and_spread([overall[index] for overall in row.probed("overall")], 2)

    lengths = experiment.outcomes[0].probed[-1]["lengths"]
    return [
        *(Column(str(length), at(index)) for index, length in enumerate(lengths)),
        Column("KiB there", kilobytes),
    ]


def _gates(experiment: Experiment) -> list[Column]:
    def over_heads(name: str, digits: int = 2) -> Callable[[Row], str]:
        return lambda row: mean_and_spread(row.over_heads(name), digits)

    def leak(row: Row) -> str:
        return mean_and_spread([a - b for a, b in zip(row.probed("parallel"), row.probed("by_token"), strict=True)])

    return [
        Column("far", lambda row: mean_and_spread(row.far)),
        Column("leak", leak),
        Column("A", over_heads("A")),
        Column("beyond w", over_heads("beyond")),
        Column("pair above", over_heads("ranked")),
        Column("pair lives", over_heads("pairs_live", 0)),
    ]
