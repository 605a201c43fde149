"""The sizes that `python -m flexdma tune` found fastest on a device: a JSON file, read once per process.

    {"format": 1, "winners": [
      {"device": "NVIDIA H100 80GB HBM3", "dtype": "bfloat16", "head_dim": 128, "group": 4, "phase": "training",
       "torch": "2.13.0", "triton": "3.9.0", "block_size": [128, 128], "kernel_options": {"fwd_num_warps": 8},
       "seconds": 0.0031, "default_seconds": 0.0035}]}

The fields before block_size are the key.  A winner of another torch or Triton is kept in the file and not used.
"""

import functools
import importlib.util
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# Names the file; empty = no file.  Without it the file is tuned.json in the folder flexdma of the user's caches.
VARIABLE = "FLEXDMA_TUNED"
FORMAT = 1
PHASES = ("inference", "training")


@dataclass(frozen=True)
class Key:
    """The calls for which a winner is the fastest."""

    device: str
    dtype: str
    head_dim: int
    group: int  # query heads per KV head
    phase: str  # one of PHASES: a forward alone, or forward and backward
    torch: str
    triton: str


@dataclass(frozen=True)
class Winner:
    """The fastest sizes for a key, and the medians of its measurement."""

    key: Key
    block_size: tuple[int, int]  # (rows, keys) of a mask block
    kernel_options: dict[str, int]
    seconds: float
    default_seconds: float  # without tuning, in the same run


def tuned_file() -> Path | None:
    """The path of the file, which need not exist; None where the variable FLEXDMA_TUNED is empty."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named) if named else None
    caches = os.environ.get("XDG_CACHE_HOME")
    return Path(caches or Path.home() / ".cache") / "flexdma" / "tuned.json"


def key_of(device: torch.device, dtype: torch.dtype, head_dim: int, group: int, *, trains: bool) -> Key:
    """The key of a call made here and now."""
    on_cpu = device.type == "cpu"
    threads = f"{torch.get_num_threads()} threads"
    name = f"CPU {torch.backends.cpu.get_cpu_capability()}, {threads}" if on_cpu else torch.cuda.get_device_name(device)
    return Key(
        name,
        str(dtype).removeprefix("torch."),
        head_dim,
        group,
        PHASES[trains],
        torch.__version__,
        _triton_version(on_cpu),
    )


def as_json(winners: Sequence[Winner]) -> str:
    """The contents of the file."""
    entries = ({**asdict(each.key), **asdict(each)} for each in winners)
    lines = ",\n ".join(json.dumps({name: v for name, v in entry.items() if name != "key"}) for entry in entries)
    return f'{{"format": {FORMAT}, "winners": [\n {lines}\n]}}\n'


def from_json(text: str) -> list[Winner]:
    """The inverse of `as_json`.  Raises ValueError for other texts."""
    try:
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise ValueError(f"expected format {FORMAT}, got {found['format']!r}")
        return [_winner(entry) for entry in found["winners"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


@functools.cache
def winners_of(path: Path) -> dict[Key, Winner]:
    """The winners in a file, none if there is no file.  A file that cannot be read is named in a warning."""
    try:
        return {each.key: each for each in from_json(path.read_text(encoding="utf-8"))}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{path}: expected JSON that `python -m flexdma tune` wrote, so it is not used ({error})", stacklevel=2
        )
        return {}


def winner(key: Key) -> Winner | None:
    """The winner for a key; None where nothing was measured."""
    path = tuned_file()
    return None if path is None else winners_of(path).get(key)


def _winner(entry: dict) -> Winner:
    values = dict(entry)
    key = Key(**{name: values.pop(name) for name in Key.__dataclass_fields__})
    rows, columns = values.pop("block_size")
    sizes = [rows, columns, *values["kernel_options"].values()]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"expected positive whole numbers in block_size and kernel_options, got {sizes}")
    return Winner(key, (rows, columns), **values)


def _triton_version(on_cpu: bool) -> str:
    """Triton's version, empty on a CPU, where Inductor generates C++."""
    if on_cpu or importlib.util.find_spec("triton") is None:
        return ""
    import triton

    return triton.__version__
