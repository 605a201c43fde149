"""docs/results.md: everything that the JSON beside it says, and nothing else."""

from collections.abc import Sequence
from pathlib import Path

from flexdma.atomic_write import atomic_write
from flexdma.tools.experiments.experiment import Experiment, mean_and_spread
from flexdma.tools.experiments.gate_variants import CANDIDATES
from flexdma.tools.experiments.presets import PRESETS
from flexdma.tools.experiments.reports.claims import UNMEASURED, claims_table
from flexdma.tools.experiments.reports.columns import columns_of
from flexdma.tools.experiments.reports.tables import explained, markdown

PREFIX = "experiments-"
HEAD = """# Results

    python -m flexdma experiments results    # this page, from the JSON in docs/results

Small models that differ only in their attention, trained as [experiments](experiments.md) describes. Numbers are the mean
± the standard deviation over seeds, at the learning rate that is best for each mixer. Seconds are wall time, on cores that
other processes may have shared.

## The paper's claims

What the abstract of [arXiv 2508.02124](https://arxiv.org/abs/2508.02124v1) says, beside these runs of far smaller models. A
difference counts where it exceeds the sum of both spreads. `DMA` is the paper's; a recency is this project's.

"""


def read_experiments(folder: Path) -> list[Experiment]:
    """The experiments-NAME.json of a folder in the order of the presets.  Raises ValueError for other JSON."""
    found = [Experiment.read(path) for path in sorted(folder.glob(f"{PREFIX}*.json"))]
    order = [f"{task}-{preset}" for preset, settings in PRESETS.items() for task in settings]
    return sorted(
        found, key=lambda experiment: order.index(experiment.name) if experiment.name in order else len(order)
    )


def page(experiments: Sequence[Experiment]) -> str:
    """The page as Markdown."""
    parts = [HEAD + claims_table(experiments)]
    for preset in PRESETS:
        of_preset = [experiment for experiment in experiments if experiment.preset == preset]
        language = [experiment for experiment in of_preset if experiment.kind == "lm"]
        parts += [_section(experiment) for experiment in of_preset if experiment.kind != "lm"]
        parts += [_language_section(language, preset)] if language else []
    missing = _missing(experiments)
    if missing:
        parts.append(f"## Not measured\n\n{missing}\n")
    return "\n".join(parts)


def write_page(path: Path, experiments: Sequence[Experiment]) -> None:
    """The page, and its pictures in the folder of the same name."""
    from flexdma.tools.experiments.reports.pictures import language_pictures, pictures

    folder = path.with_suffix("")
    for preset in PRESETS:
        language_pictures(folder, PREFIX, [e for e in experiments if e.preset == preset and e.kind == "lm"])
    for experiment in experiments:
        pictures(folder, PREFIX, experiment)
    atomic_write(path, lambda part: part.write_text(page(experiments)))


def _section(experiment: Experiment) -> str:
    name = experiment.name
    more = {"niah": "heat-maps", "gates": "gates"}.get(experiment.kind)
    drawn = [f"{PREFIX}{name}"] + ([f"{PREFIX}{name}-{more}"] if more else [])
    shown = "\n\n".join(f"![{experiment.task}](results/{picture}.png)" for picture in drawn)
    return f"## {name}\n\n{_setup([experiment])}\n\n{explained(experiment)}.\n\n{markdown(experiment)}\n{shown}\n"


def _language_section(experiments: Sequence[Experiment], preset: str) -> str:
    """All texts and sizes in one table."""
    mixers = dict.fromkeys(row.mixer for experiment in experiments for row in experiment.rows())
    headings = [f"{e.task.removeprefix('lm-')}, {e.outcomes[0].parameters:,} parameters" for e in experiments]
    lines = [
        f"| mixer | a query sees | {' | '.join(headings)} |",
        f"|---|---|{'---:|' * len(headings)}",
    ]
    for mixer in mixers:
        cells = [_language_cell(experiment, mixer) for experiment in experiments]
        lines.append(f"| {mixer} | {CANDIDATES[mixer].sees} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    picture = f"![bits per byte over parameters](results/{PREFIX}lm-{preset}.png)"
    words = (
        "Bits per byte of held-out text, and the difference from attention to all earlier keys with the same positional "
        "bias: `full`, `full + slope`, or `FoX` for forget gates."
    )
    return f"## lm-{preset}\n\n{_setup(experiments)}\n\n{words}\n\n{table}\n\n{picture}\n"


def _language_cell(experiment: Experiment, mixer: str) -> str:
    row = experiment.row(mixer)
    if row is None:
        return UNMEASURED
    relative = next(column for column in columns_of(experiment) if column.heading.startswith("against"))
    return f"{mean_and_spread(row.bits)} ({relative.cell(row)})"


def _setup(experiments: Sequence[Experiment]) -> str:
    """Sizes, seeds, machine, versions and time of experiments that share all but widths and texts."""
    first = experiments[0]
    sizes, schedule, task = (first.setting[name] for name in ("sizes", "schedule", "task"))
    machine = first.machine
    threads = f", {machine['threads']} thread(s)" if machine["threads"] else ""
    hours = sum(experiment.seconds for experiment in experiments) / 3600
    runs = sum(len(experiment.outcomes) for experiment in experiments)
    files = ", ".join(f"[{e.name}.json](results/{PREFIX}{e.name}.json)" for e in experiments)
    width = "" if len(experiments) > 1 else f" of width {sizes['width']}"
    anneal = schedule.get("anneal")
    shrinking = f" (windows of DMA shrink from N to w in the first {anneal:.0%})" if anneal else ""
    layers = " or ".join(dict.fromkeys(str(experiment.setting["sizes"]["layers"]) for experiment in experiments))
    return (
        f"N = {task['length']:,}, w = {sizes['window']}, {layers} layer(s){width}, {schedule['steps']:,} steps x "
        f"{schedule['batch']} sequences{shrinking}; learning rates {', '.join(f'{rate:g}' for rate in first.rates)}; seeds "
        f"{', '.join(map(str, first.seeds))}. {machine['device']}{threads}, torch {machine['torch']}, Python "
        f"{machine['python']}, flexdma {machine['flexdma']}; {runs} trainings of {hours:.1f} hours together. {files}"
    )


def _missing(experiments: Sequence[Experiment]) -> str:
    """The presets' experiments without results, a line per preset."""
    done = {experiment.name for experiment in experiments}
    lines = []
    for preset, settings in PRESETS.items():
        names = [f"`{task}`" for task in settings if f"{task}-{preset}" not in done]
        lines += [f"- {preset}: {', '.join(names)}"] if names else []
    return "\n".join(lines)
