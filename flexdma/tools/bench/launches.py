"""The work of a call on the device: number of kernels, their time, and number of launches by the host."""

from collections.abc import Callable

import torch

# Functions of the CUDA runtime and driver.  A graph is one launch.
LAUNCH = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


def device_work(call: Callable[[], object]) -> dict[str, float]:
    """{"kernels", "launches", "device_seconds", "attention_seconds"} of a call that has already run once.

    attention_seconds: of the kernels that Inductor made from FlexAttention's templates.  All are 0 without a GPU.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = profile.profiler.kineto_results.events()
    # A user annotation on the device spans kernels, so it would be counted twice.
    on_device = [e for e in events if e.device_type() == torch.autograd.DeviceType.CUDA and not e.is_user_annotation()]
    kernels = [e for e in on_device if not e.name().startswith(("Memcpy", "Memset"))]
    return {
        "kernels": len(kernels),
        "launches": sum(event.name() in LAUNCH for event in events),
        "device_seconds": sum(event.duration_ns() for event in on_device) / 1e9,
        "attention_seconds": sum(e.duration_ns() for e in kernels if "flex_attention" in e.name()) / 1e9,
    }
