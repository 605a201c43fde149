"""python -m flexdma COMMAND: what can be run without writing code.

A command is a module with `add_arguments(parser)` and `run(arguments) -> int`; only the one asked for is imported.
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
    "explain": ("flexdma.tools.explain.command", "say what gates select, what that costs, and whether it pays"),
    "doctor": ("flexdma.tools.doctor.command", "find graph breaks, recompilations and fallbacks of a model call"),
    "inspect": ("flexdma.tools.inspect.command", "show the kernels that the compiler generates"),
    "cost": ("flexdma.tools.cost.command", "say what a size would cost on a device, or on many, from its data sheet"),
    "bench": ("flexdma.tools.bench.command", "measure the operator against attention to everything"),
    "demo": ("flexdma.tools.demo.command", "train four small language models on real text and compare their attention"),
    "longrun": (
        "flexdma.tools.longrun.command",
        "read a million tokens in constant memory, then decode at constant cost",
    ),
    "view": ("flexdma.tools.view.command", "write a page that shows which tokens of a text each query keeps"),
}
CANNOT = 2
# What a shell reports for a process that Ctrl-C ended, and for one whose reader went away.
INTERRUPTED, UNREAD = 130, 141


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to an option's help, where there is one and the help does not say it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        unsaid = action.default is not None and action.default is not False and "default" not in (action.help or "")
        return super()._get_help_string(action) if unsaid else action.help


class _CommandParser(argparse.ArgumentParser):
    """Refuses an option as commands refuse what they find out later: "--window: expected at least 1, got 0"."""

    def error(self, message: str) -> NoReturn:
        raise RefusedError(message.removeprefix("argument "))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 a request that cannot be met, 130 interrupted."""
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
        # `... | head` has seen enough; Python would complain once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return UNREAD
    except KeyboardInterrupt:
        print(f"python -m flexdma {arguments[0]}: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
