"""Stand-ins for a CUDA or ROCm device, so that Inductor generates and Triton compiles GPU kernels on a machine without a GPU.

The code that generates kernels stays torch's and Triton's own.  Only queries of device properties, such as the number of
multiprocessors, return values of `targets.TARGETS`.  The stand-ins replace functions of the whole process, so install them
in a separate process (`child.py`), never in a user's.
"""

import types
from typing import Any

import torch

from flexdma.tools.inspect.device_guard import install_device_guard
from flexdma.tools.inspect.targets import Target

# The version of ROCm that torch finds itself built for.  Inductor reads only whether there is one.
ROCM = "6.4.43482"


def install(target: Target) -> None:
    """Make torch and Triton in this process find one device of this kind.  Tensors on it must be fake.

    Raises RuntimeError for other builds of torch than the tested ones, and where Triton cannot compile for the target.
    """
    install_device_guard()
    _check_compiler(target)
    if target.gfx:
        # Inductor then generates as in a ROCm build: its tile sizes, options and intrinsics for AMD.
        torch.version.hip, torch.version.cuda = ROCM, None
    # Run the backward in this thread, because a thread per device would query the driver.
    torch._C._set_multithreading_enabled(False)
    _answer_for_the_device(target)
    _answer_for_the_driver(target)
    _leave_out_what_needs_data()


def _answer_for_the_device(target: Target) -> None:
    from torch._dynamo.device_interface import CudaInterface

    properties = types.SimpleNamespace(
        name=target.name,
        major=target.capability // 10,
        minor=target.capability % 10,
        multi_processor_count=target.multiprocessors,
        total_memory=target.total_memory,
        max_threads_per_multi_processor=target.threads_per_multiprocessor,
        max_threads_per_block=1024,
        regs_per_multiprocessor=target.registers_per_multiprocessor,
        warp_size=target.warp_size,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=target.shared_memory_per_block,
        shared_memory_per_multiprocessor=target.shared_memory_per_multiprocessor,
        L2_cache_size=target.l2_bytes,
        gcnArchName=target.gfx,
        uuid="none",
    )
    capability = (properties.major, properties.minor)
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: capability,
        "is_current_stream_capturing": lambda: False,  # Dynamo calls it since torch 2.14
        "synchronize": lambda device=None: None,
        "set_device": lambda device: None,
        "get_rng_state": lambda *_, **__: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_, **__: None,
        "_lazy_init": lambda: None,
        "_exchange_device": lambda device: 0,
        # A separate function, because Dynamo finds functions by identity and accepts only one name for each.
        "_maybe_exchange_device": lambda device: 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    for name in ("current_device", "device_count", "synchronize", "get_device_properties"):
        setattr(CudaInterface, name, staticmethod(answers[name]))
    # Otherwise Dynamo queries the accelerator's current stream.
    torch.accelerator.is_available = lambda: False
    torch._C._cuda_getCurrentRawStream = lambda device: 0


def _answer_for_the_driver(target: Target) -> None:
    import triton
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget

    triton_target = ("hip", target.gfx, 64) if target.gfx else ("cuda", target.capability, 32)
    limits = {"max_shared_mem": target.shared_memory_per_block}
    driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget(*triton_target),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
        utils=types.SimpleNamespace(get_device_properties=lambda device: limits),
    )
    triton.runtime.driver.set_active(driver)
    triton_helpers.set_driver_to_gpu = lambda: None


def _check_compiler(target: Target) -> None:
    import triton
    from triton.backends import backends

    needed = "amd" if target.gfx else "nvidia"
    if needed not in backends:
        raise RuntimeError(
            f"target: expected a Triton with the backend {needed!r} to compile for {target.name}; Triton "
            f"{triton.__version__} has {', '.join(map(repr, sorted(backends)))}"
        )


def _leave_out_what_needs_data() -> None:
    from torch._inductor import config
    from torch._inductor.fx_passes import joint_graph
    from torch._subclasses import fake_tensor

    # A CUDA build opens a context with the first fake tensor.
    setattr(fake_tensor, "init_gpu_context", lambda device: None)  # noqa: B010 (typed as a cached function)
    # The search for attention patterns traces with real CUDA tensors, and constant folding computes on them.
    joint_graph.lazy_init = lambda *_, **__: None
    config.joint_graph_constant_folding = False
