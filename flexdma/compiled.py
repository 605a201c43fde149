"""Functions that are compiled for eager callers."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])
# Compilations of one function in a process: one for each combination of dtypes, options and sizes that are not dynamic.
RECOMPILE_LIMIT = 64


def compiled(function: Function) -> Function:
    """`torch.compile(function)`.  Past the limit it raises instead of running uncompiled."""
    patch = torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT)
    return patch(torch.compile(function, fullgraph=True))


def compiled_on_gpu(function: Function) -> Function:
    """Decorator: an eager call with a first argument on a GPU runs compiled; any other call is the function's own.

    For functions of dozens of small operations without a gradient.  On a GPU each operation is a launch, for which the host
    takes longer than the device.
    """
    fused = compiled(function)

    @wraps(function)
    def dispatch(first: Tensor, *rest: Any) -> Any:
        if first.device.type in ("cpu", "meta") or torch.compiler.is_compiling():
            return function(first, *rest)
        with torch.no_grad():  # not one compilation more for each mode
            return fused(first, *rest)

    return dispatch  # type: ignore[return-value]
