"""The other process of cross-compilation: `python -m flexdma.tools.inspect.child REQUEST ANSWER`, started by `remote.py`.

It installs the stand-ins for a GPU, rebuilds the call with fake tensors on it, and writes the report as JSON.
"""

import json
import pickle
import sys
import traceback
import warnings
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flexdma.tools.inspect.call import report_of, run_once
from flexdma.tools.inspect.capture import watching
from flexdma.tools.inspect.standins import install
from flexdma.tools.inspect.targets import known_target


def main(request: str, answer: str) -> None:
    """Write the report for the request, or the error for the caller to raise."""
    # Inductor checks the alignment of fake tensors' data, which they do not have.
    warnings.filterwarnings("ignore", message=".*data pointer of FakeTensor.*")
    try:
        with open(request, "rb") as file:
            result = {"report": _inspect(file)}
    except (ValueError, TypeError, RuntimeError) as error:
        traceback.print_exc()
        result = {"error": type(error).__name__, "message": str(error)[:4000]}
    Path(answer).write_text(json.dumps(result))


def _inspect(request: IO[bytes]) -> str:
    target_name, figures, gradients = pickle.load(request)
    target = known_target(target_name)
    install(target)
    with FakeTensorMode(), watching(launch=False, device="cuda") as seen:
        fn_or_module, args, kwargs = _FakeUnpickler(request).load()
        with torch.set_grad_enabled(gradients):
            run_once(fn_or_module, args, kwargs)
    source = "; source generated as by a ROCm build" if target.gfx else ""
    device = f"{target.name} ({target_name}), compiled without one{source}"
    return report_of(fn_or_module, seen, device, target, figures).to_json()


class _FakeUnpickler(pickle.Unpickler):
    """Loads tensors without data, on the stand-in CUDA device."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._known: dict[int, Tensor] = {}

    def persistent_load(self, description: Any) -> Tensor:
        identity, shape, stride, dtype, requires_grad, is_parameter = description
        if identity not in self._known:
            tensor = torch.empty_strided(shape, stride, dtype=getattr(torch, dtype), device="cuda")
            self._known[identity] = (
                nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)
            )
        return self._known[identity]


if __name__ == "__main__":
    main(*sys.argv[1:])
