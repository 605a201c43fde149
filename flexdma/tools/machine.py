"""The machine of a measurement, and its compilers."""

import importlib.util
import platform
from pathlib import Path
from typing import Any

import torch

from flexdma._version import __version__


def machine(device: torch.device | str) -> dict[str, Any]:
    """The processor or GPU, threads of a CPU, system and versions, to record with measured numbers."""
    device = torch.device(device)
    on_cpu = device.type == "cpu"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads() if on_cpu else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "flexdma": __version__,
    }


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def triton_version() -> str | None:
    """Triton's version; None if it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return triton.__version__


def cpp_compiler() -> str | None:
    """Inductor's command for the C++ compiler; None if there is none."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return None


def _processor() -> str:
    """The processor's name, on Linux from /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
