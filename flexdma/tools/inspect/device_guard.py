"""The CUDA stand-ins for C++ objects, which Python cannot replace: those that need a driver or are missing in a CPU build.

Tracing a CUDA tensor needs a device guard (to copy) and a table of hooks (autograd queries it for streams in use).  Without a
device torch replaces its guard by one that does nothing.  A CPU build has no guard to replace, so this file registers one.
It also replaces two hooks.  Hooks are entries of a C++ vtable, whose positions are known only for the tested builds of torch.
Use the process for nothing else afterwards.
"""

import ctypes
import os

import torch

# Version and whether it is a CUDA build.
TESTED = (("2.11.0", True), ("2.13.0", False), ("2.14.1", True))
# Positions in the vtable of at::CUDAHooksInterface, the same in all tested builds.  Two words before it belong to it (offset
# to top, RTTI).
VTABLE_ENTRIES, WORDS_BEFORE, IS_BUILT, HAS_PRIMARY_CONTEXT = 64, 2, 2, 4
CUDA_DEVICE_TYPE = 1  # c10::DeviceType::CUDA, the index into the registry of guards
_kept_alive: list[object] = []


def install_device_guard() -> None:
    """Make torch work with CUDA tensors that have no data, on a machine without a CUDA driver."""
    cuda_build = bool(torch.version.cuda)
    if (torch.__version__.split("+")[0], cuda_build) not in TESTED:
        tested = " or ".join(f"{version} ({'CUDA' if cuda else 'CPU'} build)" for version, cuda in TESTED)
        raise RuntimeError(
            f"target: expected torch {tested} to compile for a GPU without having one, got {torch.__version__}"
        )
    libraries = os.path.join(os.path.dirname(torch.__file__), "lib")
    if not cuda_build:
        _give_a_guard_without_devices(ctypes.CDLL(os.path.join(libraries, "libc10.so")))
    # This replaces the guard by one that does nothing, if it counts no devices.
    torch._C._ensureCUDADeviceGuardSet()
    _answer_hooks(ctypes.CDLL(os.path.join(libraries, "libtorch_cpu.so")))
    accelerator = torch._C._accelerator_getAccelerator()
    if accelerator.type != "cuda":
        raise RuntimeError(
            f"torch {torch.__version__} did not accept the stand-ins for CUDA: its device is {accelerator}"
        )


def _give_a_guard_without_devices(core: ctypes.CDLL) -> None:
    """Register a guard all of whose methods return 0, so that it counts 0 devices."""
    table = (ctypes.c_void_p * VTABLE_ENTRIES)(*[_returning(0)] * VTABLE_ENTRIES)
    guard = ctypes.c_void_p(ctypes.addressof(table))
    _kept_alive.extend([table, guard])
    registry = (ctypes.c_void_p * 32).in_dll(core, "_ZN3c104impl26device_guard_impl_registryE")
    registry[CUDA_DEVICE_TYPE] = ctypes.addressof(guard)


def _answer_hooks(library: ctypes.CDLL) -> None:
    """Replace two hooks: CUDA is built in, and no device has a context."""
    get_hooks = library._ZN2at6detail12getCUDAHooksEv
    get_hooks.restype = ctypes.c_void_p
    hooks = get_hooks()
    before = (ctypes.c_void_p.from_address(hooks).value or 0) - WORDS_BEFORE * 8
    words = VTABLE_ENTRIES + WORDS_BEFORE
    table = (ctypes.c_void_p * words).from_buffer_copy(ctypes.string_at(before, words * 8))
    table[WORDS_BEFORE + IS_BUILT] = _returning(1)
    table[WORDS_BEFORE + HAS_PRIMARY_CONTEXT] = _returning(0)
    _kept_alive.append(table)
    ctypes.c_void_p.from_address(hooks).value = ctypes.addressof(table) + WORDS_BEFORE * 8


def _returning(value: int) -> int:
    """The address of a C function of one pointer that returns `value`."""
    function = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(lambda _: value)
    _kept_alive.append(function)
    return ctypes.cast(function, ctypes.c_void_p).value or 0
