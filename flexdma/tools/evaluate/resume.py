"""What an earlier run left in --out, where this run may go on from it."""

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
    Raises RefusedError where there is no earlier run, and where it had other models of the same names, texts, sizes, or
    another machine: its numbers would stand beside others in one table.
    """
    path = out / RECORDS
    try:
        found = Results.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RefusedError(f"--resume: expected a folder that evaluate wrote, got {out}") from error
    before = found.about
    if before.get("suite") != SUITE or "plan" not in before or "retrofit" in before:
        raise RefusedError(f"--resume: expected a folder that evaluate wrote, got {out}")
    wanted = {name: setting[name] for name in COMMON} | setting["plan"] | {"first MODEL": _first(setting)}
    had = {name: before.get(name) for name in COMMON} | before["plan"] | {"first MODEL": _first(before)}
    for name, value in wanted.items():
        if had[name] != value:
            raise RefusedError(f"--resume: expected the {name} of {path}, {had[name]}, got {value}")
    known = {model["name"]: model for model in before["models"]}
    for model in setting["models"]:
        if known.setdefault(model["name"], model) != model:
            raise RefusedError(
                f"--resume: expected MODEL {model['name']} as in {path}, got one converted in another way"
            )
    before["models"] = list(known.values())
    found.records = [record for record in found.records if not is_skipped(record)]
    return found


def _first(about: dict[str, Any]) -> str:
    """The name of the model that is measured with full attention too."""
    return str(about["models"][0]["name"])
