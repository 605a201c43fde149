"""`python -m flexdma doctor`: check calls of your model, or flexdma itself on this machine."""

import argparse
from collections.abc import Callable
from typing import Any

from flexdma.tools.arguments import Function, function
from flexdma.tools.doctor.call import BACKENDS, doctor
from flexdma.tools.doctor.self_check import self_check
from flexdma.tools.refusal import refusing

PROBLEMS = 1  # exit code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.epilog = "Exit code: 0 no problems, 1 problems, 2 refused."
    parser.add_argument(
        "entry", nargs="?", type=function, metavar="MODULE:FUNCTION",
        help="a function that returns (callable, [arguments of a call, ...]); with --calls the callable itself; "
        "without it, check flexdma itself",
    )  # fmt: skip
    parser.add_argument(
        "--calls", type=function, metavar="MODULE:FUNCTION",
        help="a function that returns [arguments of a call, ...], each a tuple",
    )  # fmt: skip
    parser.add_argument(
        "--backend", choices=BACKENDS, default="inductor", help="eager only captures graphs, in seconds"
    )
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


def _patient(entry: Function, calls: Function | None) -> tuple[Callable, list[Any]]:
    if calls is not None:
        return entry.call, list(_returned("--calls", calls))
    returned = _returned("entry", entry)
    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], list | tuple)):
        raise TypeError(
            f"{entry.text}: expected it to return (callable, [arguments of a call, ...]), got {type(returned).__name__}"
        )
    return returned[0], list(returned[1])


def _returned(argument: str, function: Function) -> Any:
    try:
        return function.call()
    except Exception as error:
        raise ValueError(f"{argument}: {function.text}() raised {type(error).__name__}: {error}") from error
