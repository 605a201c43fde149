"""What the benchmark measured, as one tidy table: (section, shape, contender, metric, value).

Tables, targets, fits and pictures are pivots of it.  As JSON:

    {"machine": {...}, "suite": "cpu", ...,
     "shapes": {"forward, N=16384 w=1024": {"length": 16384, "window": 1024, ...}, ...},
     "columns": ["section", "shape", "contender", "metric", "value"],
     "records": [["calls", "forward, N=16384 w=1024", "SDPA causal", "seconds", 2.0097], ...]}
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flexdma.tools.shapes import Shape


class Record(NamedTuple):
    """One number, or the reason why there is none (metrics "failed" and "skipped").

    contender: "" where the whole case failed or was skipped.
    """

    section: str
    shape: str
    contender: str
    metric: str
    value: float | str


@dataclass(frozen=True)
class Case:
    """The records of one section and shape: contender -> metric -> value, in the order in which they were made."""

    section: str
    title: str
    shape: Any  # a Shape; None where the section has none
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def metric(self, name: str) -> dict[str, Any]:
        """Contender -> value, of the contenders that have this metric."""
        return {contender: row[name] for contender, row in self.rows.items() if name in row}

    @property
    def seconds(self) -> dict[str, float]:
        """By contender."""
        return self.metric("seconds")


@dataclass
class Results:
    """The table, the shapes that it names, and where it was measured.

    about: machine, suite, device, dtype, rounds, heads; the suite alone where nothing is measured.
    """

    about: dict[str, Any]
    shapes: dict[str, Shape] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def cases(self, section: str) -> list[Case]:
        """Those of the sections whose name begins so; without what failed or was skipped as a whole."""
        cases: dict[tuple[str, str], Case] = {}
        for record in self.records:
            if record.contender and record.section.startswith(section):
                new = Case(record.section, record.shape, self.shapes.get(record.shape))
                case = cases.setdefault((record.section, record.shape), new)
                case.rows.setdefault(record.contender, {})[record.metric] = record.value
        return list(cases.values())

    def whole_cases(self, metric: str) -> Iterator[tuple[str, str]]:
        """("section: shape", why) of the cases that "failed" or were "skipped" as a whole."""
        for record in self.records:
            if not record.contender and record.metric == metric:
                yield f"{record.section}: {record.shape}", str(record.value)

    def add(self, section: str, title: str, rows: Iterable[tuple[str, str, Any]]) -> None:
        """rows: (contender, metric, value)."""
        self.records += (Record(section, title, *row) for row in rows)

    def as_dict(self) -> dict[str, Any]:
        """What the JSON holds."""
        shapes = {name: shape.sizes() for name, shape in self.shapes.items()}
        return self.about | {"shapes": shapes, "columns": list(Record._fields), "records": self.records}

    def to_json(self) -> str:
        """A record a line."""
        everything = self.as_dict()
        lines = ",\n  ".join(map(json.dumps, everything.pop("records")))
        head = json.dumps(everything, indent=1).removesuffix("\n}")
        return f'{head},\n "records": [\n  {lines}\n ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> "Results":
        """Raises ValueError where `to_json` did not write the text."""
        found = json.loads(text)
        if not isinstance(found, dict) or found.pop("columns", None) != list(Record._fields):
            raise ValueError(f"expected the columns {', '.join(Record._fields)}")
        try:
            shapes = {name: Shape(**sizes) for name, sizes in found.pop("shapes").items()}
            records = [Record(*row) for row in found.pop("records")]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return cls(found, shapes, records)
