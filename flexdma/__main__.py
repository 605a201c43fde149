"""python -m flexdma COMMAND: the command line.

A command is a module with `add_arguments(parser)` and `run(arguments) -> int`.  Only the requested one is imported.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from flexdma._version import __version__
from flexdma.tools.refusal import RefusedError

# name: (module, what it does)
COMMANDS = {
    "explain": ("flexdma.tools.explain.command", "report what gates select, what that costs, and whether it pays"),
    "doctor": ("flexdma.tools.doctor.command", "find graph breaks, recompilations and fallbacks of a model call"),
    "inspect": ("flexdma.tools.inspect.command", "show the kernels that the compiler generates"),
    "cost": ("flexdma.tools.cost.command", "predict the cost of a size on one or more devices, from their data sheets"),
    "bench": ("flexdma.tools.bench.command", "measure the operator against full attention and others"),
    "tune": (
        "flexdma.tools.tune.command",
        "measure tiles and warps on this machine and keep the fastest for later calls",
    ),
    "demo": ("flexdma.tools.demo.command", "train four small language models on real text and compare their attention"),
    "experiments": (
        "flexdma.tools.experiments.command",
        "train attentions side by side on tasks that separate them, over learning rates and seeds",
    ),
    "longrun": (
        "flexdma.tools.longrun.command",
        "read a million tokens in constant memory, then decode at constant cost",
    ),
    "evaluate": (
        "flexdma.tools.evaluate.command",
        "compare a language model under full attention, a window, gates and kvpress at equal keys",
    ),
    "retrofit": (
        "flexdma.tools.retrofit.command",
        "convert a language model that you have to bounded memory, and measure what that costs",
    ),
    "policies": (
        "flexdma.tools.policies.command",
        "list all systems that choose keys: what they select by, what they visit, and what makes them here",
    ),
    "view": ("flexdma.tools.view.command", "write a page that shows which tokens of a text each query keeps"),
}
CANNOT = 2
# The exit codes of a shell for a process ended by Ctrl-C, and for one whose reader closed the pipe.
INTERRUPTED, UNREAD = 130, 141


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help, unless there is none or the help already contains it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_missing = action.default is not None and action.default is not False and "default" not in (action.help or "")
        return super()._get_help_string(action) if is_missing else action.help


class _CommandParser(argparse.ArgumentParser):
    """Reports a wrong option in the form of the commands' own errors: "--window: expected at least 1, got 0"."""

    def error(self, message: str) -> NoReturn:
        raise RefusedError(message.removeprefix("argument "))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 refused, 130 interrupted, 141 output pipe closed."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m flexdma", description="Dynamic Mask Attention, from a command line."
    )
    parser.add_argument("--version", action="version", version=f"flexdma {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_CommandParser)
    for name, (module, summary) in COMMANDS.items():
        subparser = commands.add_parser(name, help=summary, description=summary, formatter_class=_HelpFormatter)
        if arguments[:1] == [name]:
            chosen = importlib.import_module(module)
            chosen.add_arguments(subparser)
    try:
        parsed = parser.parse_args(arguments)
        code = chosen.run(parsed)
        sys.stdout.flush()
        return code
    except RefusedError as error:
        print(f"python -m flexdma {arguments[0]}: {error}", file=sys.stderr)
        return CANNOT
    except BrokenPipeError:
        # `... | head` closed the pipe.  Without this, Python prints another error when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except KeyboardInterrupt:
        print(f"python -m flexdma {arguments[0]}: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
