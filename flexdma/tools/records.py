"""The results of the benchmark as one tidy table: (section, shape, contender, metric, value).

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
    """One number, or with the metrics "failed" and "skipped" the reason why there is none.

    contender: "" where the whole case failed or was skipped.
    """

    section: str
    shape: str
    contender: str
    metric: str
    value: float | str


@dataclass(frozen=True)
class Case:
    """The records of one section and shape: contender -> metric -> value, in order of measurement."""

    section: str
    title: str
    shape: Any  # a Shape; None for sections without shapes
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def metric(self, name: str) -> dict[str, Any]:
        """Contender -> value, for contenders with this metric."""
        return {contender: row[name] for contender, row in self.rows.items() if name in row}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by contender."""
        return self.metric("seconds")


@dataclass
class Results:
    """The table, its shapes, and the setting of the measurement.

    about: machine, suite, device, dtype, rounds, heads; only the suite where nothing is measured.
    """

    about: dict[str, Any]
    shapes: dict[str, Shape] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def cases(self, section: str) -> list[Case]:
        """The cases of sections whose name begins with `section`, except those that failed or were skipped as a whole."""
        cases: dict[tuple[str, str], Case] = {}
        for record in self.records:
            if record.contender and record.section.startswith(section):
                new = Case(record.section, record.shape, self.shapes.get(record.shape))
                case = cases.setdefault((record.section, record.shape), new)
                case.rows.setdefault(record.contender, {})[record.metric] = record.value
        return list(cases.values())

    def whole_cases(self, metric: str) -> Iterator[tuple[str, str]]:
        """("section: shape", reason) of the cases that "failed" or were "skipped" as a whole."""
        for record in self.records:
            if not record.contender and record.metric == metric:
                yield f"{record.section}: {record.shape}", str(record.value)

    def add(self, section: str, title: str, rows: Iterable[tuple[str, str, Any]]) -> None:
        """Add the rows (contender, metric, value) of a case."""
        self.records += (Record(section, title, *row) for row in rows)

    def as_dict(self) -> dict[str, Any]:
        """The contents of the JSON."""
        shapes = {name: shape.sizes() for name, shape in self.shapes.items()}
        return self.about | {"shapes": shapes, "columns": list(Record._fields), "records": self.records}

    def to_json(self) -> str:
        """The results as JSON, one line per record."""
        everything = self.as_dict()
        lines = ",\n  ".join(map(json.dumps, everything.pop("records")))
        head = json.dumps(everything, indent=1).removesuffix("\n}")
        return f'{head},\n "records": [\n  {lines}\n ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> "Results":
        """The inverse of `to_json`.  Raises ValueError for other texts."""
        found = json.loads(text)
        columns = found.pop("columns", None) if isinstance(found, dict) else None
        if columns != list(Record._fields):
            raise ValueError(f"columns: expected {list(Record._fields)}, got {columns}")
        try:
            shapes = {name: Shape(**sizes) for name, sizes in found.pop("shapes").items()}
            records = [Record(*row) for row in found.pop("records")]
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return cls(found, shapes, records)
