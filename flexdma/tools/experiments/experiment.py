"""An experiment that was run: its setting, the machine and all outcomes, as one JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

from flexdma.atomic_write import atomic_write
from flexdma.tools.experiments.presets import experiment_of
from flexdma.tools.experiments.training import Outcome

BITS = 1 / log(2)  # nats to bits


class Row(NamedTuple):
    """A mixer at its best learning rate, one outcome per seed."""

    mixer: str
    rate: float
    outcomes: list[Outcome]

    @property
    def far(self) -> list[float]:
        """The last accuracy of far questions."""
        return [outcome.far[-1] for outcome in self.outcomes]

    @property
    def near(self) -> list[float]:
        """The last accuracy of near questions."""
        return [outcome.near[-1] for outcome in self.outcomes]

    @property
    def bits(self) -> list[float]:
        """The last loss in bits."""
        return [outcome.loss[-1] * BITS for outcome in self.outcomes]

    @property
    def solved(self) -> list[int]:
        """The steps of the seeds that solved the task."""
        return [step for outcome in self.outcomes if (step := outcome.solved_at()) is not None]

    def over_heads(self, name: str) -> list[float]:
        """The mean over layers and heads of what the probe found."""
        return [mean_over_heads(layers) for layers in self.probed(name)]

    def probed(self, name: str) -> list[Any]:
        """What the probe found after training under this name; nothing for mixers to which it does not apply."""
        return [outcome.probed[-1][name] for outcome in self.outcomes if name in outcome.probed[-1]]


@dataclass(frozen=True)
class Experiment:
    """All runs of a setting.

    task, preset: which of PRESETS.  setting: what every run depends on.  machine: of the runs, with versions.
    """

    task: str
    preset: str
    setting: dict[str, Any]
    machine: dict[str, Any]
    outcomes: Sequence[Outcome]

    @property
    def name(self) -> str:
        """The name of its files."""
        return f"{self.task}-{self.preset}"

    @property
    def kind(self) -> str:
        """Which of EXPERIMENTS: lm for lm-python-64."""
        return experiment_of(self.task)

    @property
    def seeds(self) -> list[int]:
        """Of all runs."""
        return sorted({outcome.seed for outcome in self.outcomes})

    @property
    def rates(self) -> list[float]:
        """The learning rates of all runs."""
        return sorted({outcome.rate for outcome in self.outcomes})

    @property
    def seconds(self) -> float:
        """Of all trainings together."""
        return sum(outcome.seconds for outcome in self.outcomes)

    def rows(self) -> list[Row]:
        """One per mixer, in order of its first run, at the rate with the best mean over seeds.

        Best is the lowest loss of language models, and the highest accuracy of far questions elsewhere.
        """
        runs: dict[str, dict[float, list[Outcome]]] = {}
        for outcome in self.outcomes:
            runs.setdefault(outcome.mixer, {}).setdefault(outcome.rate, []).append(outcome)
        return [max((Row(mixer, *rate) for rate in rates.items()), key=self._score) for mixer, rates in runs.items()]

    def row(self, mixer: str) -> Row | None:
        """That of one mixer; None where it was not trained."""
        return next((row for row in self.rows() if row.mixer == mixer), None)

    def _score(self, row: Row) -> float:
        return -fmean(row.bits) if self.kind == "lm" else fmean(row.far)

    def write(self, path: Path) -> None:
        """As JSON, one line per run."""
        about = {"task": self.task, "preset": self.preset, "setting": self.setting, "machine": self.machine}
        runs = ",\n  ".join(json.dumps(outcome.as_dict(), allow_nan=False) for outcome in self.outcomes)
        text = json.dumps(about, indent=1).removesuffix("\n}") + f',\n "runs": [\n  {runs}\n ]\n}}\n'
        atomic_write(path, lambda part: part.write_text(text))

    @classmethod
    def read(cls, path: Path) -> "Experiment":
        """The inverse of `write`.  Raises ValueError for other files."""
        found = json.loads(path.read_text())
        try:
            runs = [Outcome.from_dict(run) for run in found.pop("runs")]
            return cls(outcomes=runs, **found)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected the JSON of an experiment, got another ({error})") from error


def mean_over_heads(layers: Sequence[Sequence[float]]) -> float:
    """Of [layers][heads] numbers."""
    return fmean(number for heads in layers for number in heads)


def mean_and_spread(values: Sequence[float], digits: int = 3) -> str:
    """The mean ± the standard deviation over seeds; "-" for no number."""
    known = [value for value in values if value == value]  # NaN is not
    return f"{fmean(known):.{digits}f} ± {pstdev(known):.{digits}f}" if known else "-"
