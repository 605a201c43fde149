"""The results of several runs -> those of one, so that environments which exclude each other can be compared."""

from collections.abc import Sequence
from pathlib import Path

from flexdma.tools.long_context.contenders import FULL
from flexdma.tools.long_context.measure import NLL
from flexdma.tools.long_context.report import SUITE
from flexdma.tools.records import Record, Results
from flexdma.tools.refusal import RefusedError

TOLERANCE = 1e-3  # nats: versions of a library round differently, other weights differ by far more


def joined(paths: Sequence[Path]) -> Results:
    """All contenders of all files; one that several have is taken from the first.

    Raises RefusedError for files of other commands, other plans or tokens, and where full attention has other likelihoods,
    which are those of another model.
    """
    first, *others = (_read(path) for path in paths)
    for path, other in zip(paths[1:], others, strict=True):
        for name in ("plan", "cases"):
            if other.about[name] != first.about[name]:
                raise RefusedError(f"--join: expected the {name} of {paths[0]}, got another in {path}")
        _check_same_model(first, other, path)
        new = {
            name: which for name, which in other.about["contenders"].items() if name not in first.about["contenders"]
        }
        first.about["contenders"] |= new
        first.about.setdefault("joined", []).append({"contenders": list(new), "machine": other.about["machine"]})
        first.records += [record for record in other.records if record.contender in new or is_skipped(record)]
    measured = first.about["contenders"]
    kept = (record for record in first.records if not (is_skipped(record) and record.contender in measured))
    first.records = list(dict.fromkeys(kept))
    return first


def _read(path: Path) -> Results:
    try:
        results = Results.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError too
        raise RefusedError(f"--join: expected JSON that evaluate wrote, got {path}: {error}") from error
    if results.about.get("suite") != SUITE:
        raise RefusedError(f"--join: expected JSON that evaluate wrote, got {path}, of {results.about.get('suite')!r}")
    return results


def is_skipped(record: Record) -> bool:
    """Whether the record has the reason why a contender is missing."""
    return record.metric == "skipped"


def _check_same_model(first: Results, other: Results, path: Path) -> None:
    """Compare the likelihoods of full attention."""
    ours, theirs = (
        {record.shape: float(record.value) for record in results.records
         if (record.section, record.contender) == (NLL, FULL)}
        for results in (first, other)
    )  # fmt: skip
    for case, value in theirs.items():
        if case in ours and abs(value - ours[case]) > TOLERANCE:
            raise RefusedError(
                f"--join: expected the same model, with a likelihood of {ours[case]:.4f} under full attention ({case}), got "
                f"{value:.4f} in {path}"
            )
