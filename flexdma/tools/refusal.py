"""A command's request that cannot be met: one line on stderr and exit code 2, without a traceback."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager


class RefusedError(Exception):
    """Says what was expected and what came."""


@contextmanager
def refusing(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds are the request's fault; that nobody reads the answer is not."""
    try:
        yield
    except BrokenPipeError:
        raise
    except kinds as error:
        raise RefusedError(str(error)) from error


def check_installed(*modules: str, extra: str) -> None:
    """Raises RefusedError that names the missing ones and the extra of flexdma that installs them."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise RefusedError(f"needs {' and '.join(missing)}: pip install flexdma[{extra}]")
