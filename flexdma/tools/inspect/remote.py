"""The caller's side of cross-compilation: send the call to another Python process, and read its report.

It needs another process, because the stand-ins for a CUDA device change torch permanently.  Pickle sends the call: functions
by module and name, modules by their attributes, and tensors as shape, stride and dtype.
"""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexdma.tools.inspect.report import KernelReport

ERRORS: dict[str, type[Exception]] = {e.__name__: e for e in (ValueError, TypeError, RuntimeError)}


def inspect_in_another_process(
    fn_or_module: Callable | nn.Module, args: tuple, kwargs: dict, target: str, figures: str
) -> KernelReport:
    """See `inspect_kernels`."""
    if importlib.util.find_spec("triton") is None:
        raise ImportError(f"target={target!r} compiles with Triton, which is not installed: pip install triton")
    if getattr(fn_or_module, "__module__", None) == "__main__":
        raise ValueError(
            "fn_or_module: with a target, expected a function that another process can import; move it from the running "
            "script into a module"
        )
    with tempfile.TemporaryDirectory(prefix="flexdma-inspect-") as folder:
        request, answer = Path(folder, "request.pickle"), Path(folder, "answer.json")
        try:
            with request.open("wb") as file:
                # In two parts, because the child installs the device before it loads tensors.
                pickle.dump((target, figures, torch.is_grad_enabled()), file)
                _ShapePickler(file).dump((fn_or_module, args, kwargs))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                "fn_or_module: with a target, expected a function defined at the top level of a module, an nn.Module or a "
                f"functools.partial of one, because another process imports it ({error})"
            ) from error
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "flexdma.tools.inspect.child", str(request), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not answer.exists():
            raise RuntimeError(f"the process that compiles for {target} failed:\n{done.stderr[-2000:]}")
        result = json.loads(answer.read_text())
    if "error" in result:
        raise ERRORS.get(result["error"], RuntimeError)(result["message"])
    return KernelReport.from_json(result["report"])


class _ShapePickler(pickle.Pickler):
    """Pickles tensors without data; the same tensor twice stays the same tensor."""

    def persistent_id(self, value: Any) -> tuple | None:
        if not isinstance(value, Tensor):
            return None
        is_parameter = isinstance(value, nn.Parameter)
        dtype = str(value.dtype).removeprefix("torch.")
        return id(value), tuple(value.shape), value.stride(), dtype, value.requires_grad, is_parameter
