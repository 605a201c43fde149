"""What an earlier run left in --out, where this run may go on from it."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

from flexdma.tools.evaluate.join import is_skipped
from flexdma.tools.long_context.measure import Case
from flexdma.tools.long_context.report import RECORDS, SUITE
from flexdma.tools.records import Results
from flexdma.tools.refusal import RefusedError


def resumed(out: Path, setting: dict[str, Any], cases: dict[str, Case]) -> Results | None:
    """The results of the earlier run, which get the models of this one; None = there was none.

    setting: the `about` of this run.  cases: what it reads, by name.
    Raises RefusedError, with nothing changed, where the earlier run had other texts, sizes or another machine, because its
    numbers would stand beside others in one table, and where its models are not the first of this run, in the same order,
    because contenders have their names by that order.
    """
    path = out / RECORDS
    if not path.exists():
        return None
    try:
        found = Results.from_json(path.read_text(encoding="utf-8"))
        before = found.about
        had, models, known = _compared(before), before["models"], before.get("cases", {})
        if before["suite"] != SUITE or "retrofit" in before:
            raise ValueError(f"suite: expected {SUITE} alone, got {before['suite']}")
    except (OSError, ValueError, KeyError) as error:
        raise RefusedError(f"--resume: expected a folder that evaluate wrote, got {out}") from error
    for name, value in _compared(setting).items():
        if had.get(name) != value:
            raise RefusedError(f"--resume: expected the {name} of {path}, {had.get(name)}, got {value}")
    for old, new in zip_longest(models, setting["models"][: len(models)]):
        if new != old:
            got = "none" if new is None else new["name"]
            if got == old["name"]:
                got += " with other weights or options"
            raise RefusedError(f"MODEL: expected {old['name']} at the same place as in {path}, got {got}")
    for name, case in cases.items():
        if known.get(name, case) != case:
            raise RefusedError(f"--resume: expected the tokens of {path} in {name}, got others")
    before["models"] = setting["models"]
    found.records = [record for record in found.records if not is_skipped(record)]
    return found


def _compared(about: dict[str, Any]) -> dict[str, Any]:
    """By name, what both runs must have in common."""
    machine = {f"machine's {name}": value for name, value in about["machine"].items()}
    return machine | about["plan"] | {name: about[name] for name in ("texts", "dtype", "sinks")}
