"""The pictures of experiments, as files."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from flexdma.atomic_write import atomic_write
from flexdma.tools.experiments.experiment import Experiment
from flexdma.tools.experiments.reports.curves import curves
from flexdma.tools.experiments.reports.gate_courses import gate_courses
from flexdma.tools.experiments.reports.heat_maps import heat_maps
from flexdma.tools.experiments.reports.scaling import scaling


def pictures(folder: Path, prefix: str, experiment: Experiment) -> None:
    """FOLDER/PREFIX-NAME.png, the curves; and -heat-maps or -gates, where the experiment has them."""
    drawn = {"": curves(experiment)}
    if experiment.kind == "niah":
        drawn["-heat-maps"] = heat_maps(experiment)
    if experiment.kind == "gates":
        drawn["-gates"] = gate_courses(experiment)
    for suffix, figure in drawn.items():
        _save(folder / f"{prefix}{experiment.name}{suffix}.png", figure)


def language_pictures(folder: Path, prefix: str, experiments: Sequence[Experiment]) -> None:
    """FOLDER/PREFIXlm-PRESET.png, bits per byte over parameters; nothing without experiments."""
    if experiments:
        _save(folder / f"{prefix}lm-{experiments[0].preset}.png", scaling(experiments))


def _save(path: Path, figure: Figure) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda part: figure.savefig(part, dpi=110, format="png"))
