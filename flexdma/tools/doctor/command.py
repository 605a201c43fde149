"""`python -m flexdma doctor`: check a model call of one's own, or flexdma itself on this machine."""

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from flexdma.tools.doctor.call import BACKENDS, doctor
from flexdma.tools.doctor.self_check import self_check
from flexdma.tools.refusal import refusing

PROBLEMS = 1  # exit code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = "Exit code: 0 healthy, 1 problems were found, 2 the request cannot be met."
    parser.add_argument(
        "entry", nargs="?", metavar="MODULE:FUNCTION",
        help="returns (callable, [arguments of a call, ...]); with --calls the callable itself; left out: a self check",
    )  # fmt: skip
    parser.add_argument("--calls", metavar="MODULE:FUNCTION", help="returns [arguments of a call, ...], each a tuple")
    parser.add_argument("--backend", choices=BACKENDS, default="inductor", help="eager: graphs alone, in seconds")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the diagnosis."""
    with refusing(ValueError, TypeError):
        if arguments.entry is None:
            if arguments.calls is not None:
                raise ValueError("--calls: expected MODULE:FUNCTION to call as well, got none")
            report = self_check(arguments.backend)
        else:
            fn_or_module, calls = _patient(arguments.entry, arguments.calls)
            report = doctor(fn_or_module, *calls, backend=arguments.backend)
    print(report.to_json() if arguments.json else report)
    return 0 if report.ok else PROBLEMS


def _patient(entry: str, calls: str | None) -> tuple[Callable, list[Any]]:
    named = _named("entry", entry)
    if calls is not None:
        return named, list(_returned("--calls", calls))
    returned = _returned("entry", entry)
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], list | tuple)):
        raise TypeError(
            f"{entry}: expected it to return (callable, [arguments of a call, ...]), got {type(returned).__name__}"
        )
    return returned[0], list(returned[1])


def _returned(argument: str, text: str) -> Any:
    function = _named(argument, text)
    try:
        return function()
    except Exception as error:
        raise ValueError(f"{argument}: {text}() raised {type(error).__name__}: {error}") from error


def _named(argument: str, text: str) -> Callable:
    """The function that `package.module:function` names."""
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise ValueError(f"{argument}: expected MODULE:FUNCTION, got {text!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` has it, for the installed script too
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the module does when it is imported
        raise ValueError(
            f"{argument}: expected a module that can be imported, got {module!r}: {type(error).__name__}: {error}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{argument}: expected a function in {module}, which has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{argument}: expected {text} to be callable, got {type(found).__name__}")
    return found
