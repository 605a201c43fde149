"""Named stages of a call, for measuring where its time goes.

`staged` names the function that does the work of a stage.  Without an observer, and in compiled code, it costs nothing.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Observer = Callable[[str], AbstractContextManager]

_observer: Observer | None = None


def staged(name: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Decorator: each call of the function is a stage called `name`."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            if _observer is None:
                return function(*args, **kwargs)
            with _observer(name):
                return function(*args, **kwargs)

        return run

    return decorate


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """While active, each stage of an eager call runs inside `observer(name)`, nested stages too.

        with observed(torch.profiler.record_function):
            dynamic_mask_attention(query, key, value, gate, window_size=512)

    Stages: "ranking", "lifespans", "reference gates", "living keys", "key/value gather", "attention forward".
    """
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before
