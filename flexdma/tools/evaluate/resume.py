"""What an earlier run left in --out, where this run may go on from it."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

from flexdma.tools.evaluate.join import is_skipped
from flexdma.tools.long_context.report import RECORDS, SUITE
from flexdma.tools.records import Results
from flexdma.tools.refusal import RefusedError

# What both runs must have in common.
COMMON = ("machine", "texts", "dtype", "sinks")


def resumed(out: Path, setting: dict[str, Any]) -> Results:
    """The results of the earlier run, which get the models of this one.

    setting: the `about` of this run.
    Raises RefusedError where there is no earlier run, where it had other texts, sizes or another machine, because its numbers
    would stand beside others in one table, and where its models are not the first of this run, in the same order, because
    contenders have their names by that order.
    """
    path = out / RECORDS
    try:
        found = Results.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RefusedError(f"--resume: expected a folder that evaluate wrote, got {out}") from error
    before = found.about
    if before.get("suite") != SUITE or "plan" not in before or "retrofit" in before:
        raise RefusedError(f"--resume: expected a folder that evaluate wrote, got {out}")
    had = {name: before.get(name) for name in COMMON} | before["plan"]
    for name, value in ({name: setting[name] for name in COMMON} | setting["plan"]).items():
        if had[name] != value:
            raise RefusedError(f"--resume: expected the {name} of {path}, {had[name]}, got {value}")
    for old, new in zip_longest(before["models"], setting["models"][: len(before["models"])]):
        if new != old:
            got = "none" if new is None else new["name"]
            if got == old["name"]:
                got += ", converted in another way"
            raise RefusedError(f"MODEL: expected {old['name']} at the same place as in {path}, got {got}")
    before["models"] = setting["models"]
    found.records = [record for record in found.records if not is_skipped(record)]
    return found
