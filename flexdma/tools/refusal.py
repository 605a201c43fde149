"""Refusals of a command's request: one line on stderr and exit code 2, without a traceback."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager


class RefusedError(Exception):
    """A refused request; the message has what was expected and what came."""


@contextmanager
def refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds into RefusedError, except BrokenPipeError, which is not caused by the request."""
    try:
        yield
    except BrokenPipeError:
        raise
    except kinds as error:
        raise RefusedError(str(error)) from error


def check_installed(*modules: str, extra: str) -> None:
    """Raise RefusedError naming the missing modules and the extra of flexdma that installs them."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise RefusedError(f"needs {' and '.join(missing)}: pip install flexdma[{extra}]")
