"""The machine and its versions, and whether flexdma is tested with them."""

import importlib.metadata
import platform
from dataclasses import dataclass

import torch

from flexdma.tools.machine import cpp_compiler, triton_version
from flexdma.tools.versions import bounds


@dataclass(frozen=True)
class Environment:
    """Versions and devices; None = absent."""

    torch: str
    triton: str | None
    python: str
    cuda: str | None  # the version that torch was built for
    gpu: str | None
    avx2: bool
    cpp_compiler: str | None
    transformers: str | None = None

    def __str__(self) -> str:
        return (
            f"torch {self.torch}, triton {self.triton or 'absent'}, transformers {self.transformers or 'absent'}, "
            f"Python {self.python}, "
            f"{self.gpu or 'no GPU'} (torch built for {'CUDA ' + self.cuda if self.cuda else 'CPU'}), "
            f"AVX2 {'yes' if self.avx2 else 'no'}, C++ compiler {self.cpp_compiler or 'absent'}"
        )


def this_environment() -> Environment:
    """The environment of this process."""
    return Environment(
        torch=torch.__version__,
        triton=triton_version(),
        python=platform.python_version(),
        cuda=torch.version.cuda,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        avx2=torch.cpu._is_avx2_supported(),
        cpp_compiler=cpp_compiler(),
        transformers=_transformers(),
    )


def shortcomings(here: Environment) -> list[tuple[bool, str, str]]:
    """(is a problem, what, what to do) for everything missing or untested."""
    found = _untested("torch", here.torch)
    if here.transformers:
        found += _untested("transformers", here.transformers)
    if here.gpu and not here.triton:
        found.append((True, "there is a GPU and no Triton, so nothing compiles for it", "pip install triton"))
    if here.cuda and not here.gpu:
        found.append((
            False, "torch is built for CUDA and finds no GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES",
        ))  # fmt: skip
    if not here.cpp_compiler:
        found.append((
            not here.gpu, "there is no C++ compiler, so torch.compile cannot generate code for a CPU",
            "install g++ or clang, or set CXX",
        ))  # fmt: skip
    if not here.avx2 and not here.gpu:
        found.append((
            False, "the CPU has no AVX2, which Inductor's C++ FlexAttention needs",
            "nothing: lowering=None does not use it",
        ))  # fmt: skip
    return found


def _untested(package: str, version: str) -> list[tuple[bool, str, str]]:
    supported = bounds(package)
    if supported is None:
        return [(False, f"flexdma is not installed, so which {package} it supports is unknown", "pip install -e .")]
    install = f"pip install '{package}{supported}'"
    if supported.is_older(version):
        return [(True, f"{package} {version} is older than {supported.oldest}", install)]
    if supported.is_newer(version):
        what = f"{package} {version} is newer than the versions that flexdma is tested with, {supported}"
        return [(False, what, f"run flexdma's tests, or {install}")]
    return []


def _transformers() -> str | None:
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return None
