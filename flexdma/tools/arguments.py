"""Types of the commands' options.  Each converts the text to a value, or raises with what was expected and what came.

    parser.add_argument("--window", type=positive_int, default=1024)

`python -m flexdma cost --window 0` then prints "--window: expected at least 1, got 0" and exits with 2.
"""

import argparse
import importlib
import importlib.util
import os
import re
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from operator import ge, gt, le
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flexdma.checks import LARGEST
from flexdma.tools.records import Results
from flexdma.tools.refusal import RefusedError

KINDS = {int: "a whole number", float: "a number"}
BOUNDS = {"least": ("at least", ge), "above": ("more than", gt), "most": ("at most", le)}
# Dtypes of query, key and value that FlexAttention computes.
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def bounded(kind: type, **bounds: float) -> Callable[[str], Any]:
    """A type for a number (int or float) within bounds: least, above, most."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise ArgumentTypeError(f"expected {KINDS[kind]}, got {text!r}") from None
        for name, bound in bounds.items():
            words, holds = BOUNDS[name]
            if not holds(value, bound):
                raise ArgumentTypeError(f"expected {words} {bound}, got {value}")
        return value

    return parse


positive_int, natural = (bounded(int, least=least, most=LARGEST) for least in (1, 0))
seed = bounded(int, least=0, most=2**63 - 1)
positive_number, fraction = bounded(float, above=0), bounded(float, above=0, most=1)


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """A type for one of these names, for use inside other types, where argparse's `choices` does not work."""

    def parse(text: str) -> str:
        if text not in names:
            raise ArgumentTypeError(f"expected one of {', '.join(names)}, got {text!r}")
        return text

    return parse


def pair(text: str) -> tuple[str, str]:
    """KEY=VALUE."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ArgumentTypeError(f"expected KEY=VALUE, got {text!r}")
    return name, value


def device(*kinds: str) -> Callable[[str], str]:
    """A type for a device of these kinds (without arguments: of any kind) that this torch can use: cpu, cuda, cuda:1, ..."""

    def parse(text: str) -> str:
        if kinds and re.fullmatch(rf"({'|'.join(kinds)})(:\d+)?", text) is None:
            raise ArgumentTypeError(f"expected {' or '.join(kinds)}, got {text}")
        try:
            torch.zeros(1, device=torch.device(text)).item()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ArgumentTypeError(f"expected a device that this torch can use, got {text} ({reason})") from error
        return text

    return parse


def input_file(text: str) -> Path:
    """A readable file."""
    try:
        with open(text, "rb"):
            return Path(text)
    except OSError as error:
        raise ArgumentTypeError(f"expected a file that can be read, got {text} ({error.strerror})") from error


def bench_results(text: str) -> Results:
    """The results in a bench-SUITE.json that `python -m flexdma bench --out FOLDER` wrote."""
    path = input_file(text)
    try:
        return Results.from_json(path.read_text())
    except ValueError as error:  # JSONDecodeError too
        raise ArgumentTypeError(
            f"expected JSON that this version of the benchmark wrote, got {path}: {error}"
        ) from error


def output_file(text: str) -> Path:
    """A writable file in an existing folder."""
    path = Path(text)
    if not path.name or path.is_dir() or not os.access(path.resolve().parent, os.W_OK):
        raise ArgumentTypeError(f"expected a file in a folder that exists, got {text}")
    return path


def output_folder(text: str) -> Path:
    """A writable folder, or one that can be made."""
    path = Path(text)
    above = next(folder for folder in (path, *path.resolve().parents) if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ArgumentTypeError(f"expected a folder that can be written, got {text}")
    return path


def picture(text: str) -> Path:
    """An output file in a format that matplotlib writes."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ArgumentTypeError("needs matplotlib: pip install flexdma[plot]")
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    path = output_file(text)
    if path.suffix[1:] not in formats:
        raise ArgumentTypeError(f"expected a file name that ends in one of {', '.join(formats)}, got {text}")
    return path


class Function(NamedTuple):
    """A function and its name on the command line."""

    text: str
    call: Callable


def function(text: str) -> Function:
    """The function named by `package.module:function`."""
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise ArgumentTypeError(f"expected MODULE:FUNCTION, got {text!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # `python -m` adds it, the installed script does not
    try:
        found = importlib.import_module(module)
    except Exception as error:  # the import runs the user's code
        raise ArgumentTypeError(
            f"expected a module that can be imported, got {module!r}: {type(error).__name__}: {error}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ArgumentTypeError(f"expected a function in {module}, which has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ArgumentTypeError(f"expected {text} to be callable, got {type(found).__name__}")
    return Function(text, found)


def check_multiple(arguments: argparse.Namespace, name: str, of: str) -> None:
    """Raise RefusedError unless option `name` is a multiple of option `of`."""
    value, divisor = getattr(arguments, name), getattr(arguments, of)
    if value % divisor:
        options = (f"--{option.replace('_', '-')}" for option in (name, of))
        raise RefusedError("{}: expected a multiple of {} {}, got {}".format(*options, divisor, value))
