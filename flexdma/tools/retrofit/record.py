"""What an earlier run left in DIR, and whether this run may go on from it."""

import argparse
import zlib
from pathlib import Path
from typing import Any

from flexdma.tools.long_context.report import RECORDS
from flexdma.tools.records import Results
from flexdma.tools.refusal import RefusedError
from flexdma.tools.retrofit.texts import Parts

# Inside DIR, beside the files of the model.
REPORT = "retrofit"
# Inside DIR, the calibrated model where DIR has the distilled one.
CALIBRATED = f"{REPORT}/calibrated"
# The options that decide what the model and its measurement are.
DECIDING = ("budget", "recent", "sinks", "tokens", "sequence", "far", "distill", "lora", "seed", "dtype", "device")


def settings(options: argparse.Namespace, texts: Parts) -> dict[str, Any]:
    """By option, what a run must have in common with the one that it goes on from.  Texts are checksums."""
    chosen = {f"--{name}": getattr(options, name) for name in DECIDING}
    contents = {
        option: {name: zlib.crc32(text.encode()) for name, text in found.items()}
        for option, found in (("--text", texts.calibration), ("--evaluation-text", texts.further))
    }
    return {"MODEL": options.model, **chosen, **contents}


def earlier(options: argparse.Namespace, chosen: dict[str, Any]) -> Results | None:
    """The record of the run that this one goes on from; None = begin.

    Raises RefusedError for a folder that this run may not touch, and where the earlier run had other options.
    """
    out: Path = options.out
    if out.is_mount() or out.resolve() == Path.cwd():
        raise RefusedError(f"--out: expected a folder that can be renamed, got {out}")
    if not out.exists() or not any(out.iterdir()):
        return None
    path = out / REPORT / RECORDS
    if not (options.resume or options.overwrite):
        hint = "; --resume goes on from it, --overwrite replaces it" if path.exists() else ""
        raise RefusedError(f"--out: expected an empty folder or none, got {out}{hint}")
    option = "--resume" if options.resume else "--overwrite"
    try:
        found = Results.from_json(path.read_text(encoding="utf-8"))
        before = found.about["retrofit"]
    except (OSError, ValueError, KeyError) as error:
        raise RefusedError(f"{option}: expected a folder that retrofit wrote, got {out}") from error
    if options.overwrite:
        return None
    for name, value in chosen.items():
        if before.get(name) != value:
            raise RefusedError(
                f"{name}: expected {before.get(name)}, as in {out}, which --resume goes on from, got {value}"
            )
    return found


def check_plan(found: Results, plan: dict[str, Any], out: Path) -> None:
    """Raise RefusedError where measurements of another plan are there."""
    before = found.about.get("plan", {}) if found.records else {}
    for name, value in before.items():
        if plan[name] != value:
            raise RefusedError(
                f"--{name}: expected {value}, as in {out}, which --resume goes on from, got {plan[name]}"
            )
