"""Writes the file of winners that `flexdma.lowerings.tuned` reads."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from flexdma.atomic_write import atomic_write
from flexdma.lowerings import tuned
from flexdma.lowerings.tuned import Key, Winner
from flexdma.tools.refusal import RefusedError


def file_of_winners() -> Path:
    """The file of this user.  Raises RefusedError where the environment excludes one."""
    path = tuned.tuned_file()
    if path is None:
        raise RefusedError(f"{tuned.VARIABLE}: expected the name of a file, got an empty one")
    return path


def winners_in(path: Path) -> list[Winner]:
    """All winners of a file, of other versions too.  Raises RefusedError for a file that this command did not write."""
    try:
        return tuned.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path}: expected JSON that tune wrote, got {error}; remove it by tune --forget") from error


def keep(path: Path, winner: Winner) -> None:
    """Add a winner to the file, in place of an older one with its key."""
    _write(path, [*_others(path, winner.key), winner])


def drop(path: Path, key: Key) -> None:
    """Remove the winner with this key, if there is one."""
    if len(others := _others(path, key)) < len(winners_in(path)):
        _write(path, others)


def _others(path: Path, key: Key) -> list[Winner]:
    return [each for each in winners_in(path) if each.key != key]


def _write(path: Path, winners: Sequence[Winner]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, partial(Path.write_text, data=tuned.as_json(winners), encoding="utf-8"))
