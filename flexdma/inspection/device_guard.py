"""The part of the CUDA stand-ins that a CPU-only build of torch needs: C++ objects that the build leaves empty.

Tracing a CUDA tensor needs a device guard (to copy) and an accelerator (to run autograd).  torch puts a guard that does
nothing in place of one without devices, and asks a table of CUDA hooks whether CUDA is built in.  Both are set through
ctypes, at offsets that are known for the versions in `TESTED` only; the process must not be used for anything else.  A
CUDA build of torch needs none of this.
"""

import ctypes
import os

import torch

TESTED = ("2.13.0",)
# Positions in torch 2.13's vtables.
REGISTRY_SLOT, VTABLE_ENTRIES, IS_BUILT, HAS_PRIMARY_CONTEXT = 1, 64, 2, 4
_kept_alive: list[object] = []


def install_device_guard() -> None:
    """Make this CPU build of torch believe that it has CUDA, for tensors without data."""
    version = torch.__version__.split("+")[0]
    if version not in TESTED:
        raise RuntimeError(
            f"target: on a CPU build of torch, kernels can be compiled for a GPU with torch {', '.join(TESTED)} only, got "
            f"{torch.__version__}; a CUDA build of torch works without a GPU (pip install torch)"
        )
    libraries = os.path.join(os.path.dirname(torch.__file__), "lib")
    core = ctypes.CDLL(os.path.join(libraries, "libc10.so"))
    table = (ctypes.c_void_p * VTABLE_ENTRIES)(*[_returning(0)] * VTABLE_ENTRIES)
    guard = ctypes.c_void_p(ctypes.addressof(table))
    _kept_alive.extend([table, guard])
    registry = (ctypes.c_void_p * 32).in_dll(core, "_ZN3c104impl26device_guard_impl_registryE")
    registry[REGISTRY_SLOT] = ctypes.addressof(guard)
    # A guard that counts 0 devices: torch replaces it by its own that does nothing.
    torch._C._ensureCUDADeviceGuardSet()  # type: ignore[attr-defined]
    if not registry[REGISTRY_SLOT] or registry[REGISTRY_SLOT] == ctypes.addressof(guard):
        raise RuntimeError(f"torch {torch.__version__} did not take the stand-in for its CUDA device guard")

    get_hooks = ctypes.CDLL(os.path.join(libraries, "libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    hooks = get_hooks()
    original = ctypes.c_void_p.from_address(hooks).value or 0
    # Two words before the table (offset to top, RTTI) belong to it.
    copy = (ctypes.c_void_p * (VTABLE_ENTRIES + 2)).from_buffer_copy(
        ctypes.string_at(original - 16, (VTABLE_ENTRIES + 2) * 8)
    )
    copy[2 + IS_BUILT], copy[2 + HAS_PRIMARY_CONTEXT] = _returning(1), _returning(0)
    _kept_alive.append(copy)
    ctypes.c_void_p.from_address(hooks).value = ctypes.addressof(copy) + 16
    if torch._C._accelerator_getAccelerator().type != "cuda":
        raise RuntimeError(f"torch {torch.__version__} did not take the stand-in for its CUDA hooks")


def _returning(value: int) -> int:
    """The address of a C function of one pointer that returns `value`."""
    function = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(lambda _: value)
    _kept_alive.append(function)
    return ctypes.cast(function, ctypes.c_void_p).value or 0
