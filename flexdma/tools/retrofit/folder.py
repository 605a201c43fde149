"""Folders that an interruption leaves whole or absent."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def atomic_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a new folder beside `path`, then rename it.  An interruption leaves the old folder or none."""
    part, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("part", "old"))
    for left in (part, old):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        write(part)
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for left in (part, old):
            shutil.rmtree(left, ignore_errors=True)
