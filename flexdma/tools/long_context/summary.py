"""Records -> the numbers of tables and pictures."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from flexdma.tools.long_context.contenders import FULL, WINDOW
from flexdma.tools.long_context.measure import NEEDLES, NLL, SPEED
from flexdma.tools.records import Results

Case = dict[str, Any]


class Summary:
    """Means of the records of a measurement, which may be incomplete; what is missing is None."""

    def __init__(self, results: Results) -> None:
        self.about, self.results = results.about, results
        self.contenders: dict[str, dict[str, Any]] = results.about["contenders"]

    def values(self, section: str, contender: str, metric: str, where: Callable[[Case], bool]) -> list[float]:
        """The values of a contender in the cases of a section."""
        cases = self.about["cases"]
        return [
            float(record.value) for record in self.results.records
            if (record.section, record.contender, record.metric) == (section, contender, metric)
            and where(cases[record.shape])
        ]  # fmt: skip

    def has(self, section: str) -> bool:
        """Whether the section has results."""
        return any(record.section == section for record in self.results.records)

    def distinct(self, section: str, *names: str) -> list[Any]:
        """The different values, or tuples of values, of these names in the cases of a section, in order of measurement."""
        cases = self.about["cases"]
        found = (tuple(cases[record.shape][name] for name in names) for record in self.results.records
                 if record.section == section)  # fmt: skip
        return [each if len(names) > 1 else each[0] for each in dict.fromkeys(found)]

    def ranges(self) -> list[tuple[int, int]]:
        """The ranges of positions, the last of which is that beyond the keys of a bounded contender."""
        return self.distinct(NLL, "first", "last")

    def nll(self, contender: str, first: int, last: int, text: str | None = None) -> float | None:
        """The mean over the stretches of a text; without a text, over the means of all texts."""
        texts = self.distinct(NLL, "text") if text is None else [text]

        def of(name: str) -> Callable[[Case], bool]:
            return lambda case: (case["text"], case["first"], case["last"]) == (name, first, last)

        means = [_mean(self.values(NLL, contender, "nll", of(name))) for name in texts]
        return None if None in means else _mean(means)

    def gap_closed(self, contender: str, text: str | None = None) -> float | None:
        """How much of the difference between the window and full attention is gone, beyond the keys; 1 = all."""
        if not self.ranges():
            return None
        own, window, full = (self.nll(name, *self.ranges()[-1], text) for name in (contender, WINDOW, FULL))
        if own is None or window is None or full is None or window <= full:
            return None
        return (window - own) / (window - full)

    def needles(self, contender: str, **which: Any) -> "Needles | None":
        """The needles of a contender, where the case has these values: kind, length, depth, seed."""

        def where(case: Case) -> bool:
            return all(case[name] == value for name, value in which.items())

        exact, of_full = (self.values(NEEDLES, name, "exact", where) for name in (contender, FULL))
        if not exact:
            return None
        return Needles(
            int(sum(exact)), len(exact), sum(exact) / sum(of_full) if sum(of_full) else None,
            statistics.fmean(self.values(NEEDLES, contender, "nll", where)),
        )  # fmt: skip

    def speed(self, contender: str, length: int, metric: str) -> float | None:
        """A metric of the section "speed"."""
        return _mean(self.values(SPEED, contender, metric, lambda case: case["length"] == length))

    def notes(self) -> list[str]:
        """What failed or was not measured, with the reason."""
        reasons: dict[str, list[str]] = {}
        for record in self.results.records:
            if record.metric in ("failed", "skipped"):
                reasons.setdefault(f"{record.metric}: {record.value}", []).append(record.contender)
        notes = [f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
        positions = self.about["models"][0].get("positions")
        longest = max(self.about.get("plan", {"lengths": [0]})["lengths"])
        if positions is not None and longest > positions:
            notes.append(f"{longest:,} tokens are more than the model's max_position_embeddings, {positions:,}")
        if "calibration" in self.about:
            notes.append(_calibration(**self.about["calibration"]))
        for part in self.about.get("joined", ()):
            versions = ", ".join(f"{name} {part['machine'][name]}" for name in ("transformers", "kvpress")
                                 if name in part["machine"])  # fmt: skip
            notes.append(f"{', '.join(part['contenders'])}: measured in another run, with {versions}")
        return notes


class Needles(NamedTuple):
    """How many of so many needles (`cases`) were exact, that over full attention's number, and the nll per digit token."""

    exact: int
    cases: int
    of_full: float | None
    nll: float

    @property
    def rate(self) -> float:
        """The share that was exact."""
        return self.exact / self.cases


def _calibration(r_squared: list, windows: list, tokens: int, texts: str, **_more: Any) -> str:
    explained, kept = ([value for layer in layers for value in layer] for layers in (r_squared, windows))
    return (
        f"Calibrated on {tokens:,} tokens of {texts}; windows of {min(kept)} to {max(kept)} keys, R squared "
        f"{min(explained):.2f} to {max(explained):.2f}, mean {statistics.fmean(explained):.2f}"
    )


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return statistics.fmean(found) if found else None
