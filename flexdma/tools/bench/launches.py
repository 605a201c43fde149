"""What a call does on the device: kernels, their time, and how often the host launched something."""

from collections.abc import Callable

import torch

# Of the CUDA runtime and driver; a graph is one launch, whatever it holds.
LAUNCH = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


def device_work(call: Callable[[], object]) -> dict[str, float]:
    """{"kernels", "launches", "device_seconds", "attention_seconds"} of one call that has been run before.

    attention_seconds: of the kernels that Inductor made from FlexAttention's templates.  All 0 where there is no GPU.
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
    # An annotation on the device spans the kernels that it names.
    on_device = [e for e in events if e.device_type() == torch.autograd.DeviceType.CUDA and not e.is_user_annotation()]
    kernels = [e for e in on_device if not e.name().startswith(("Memcpy", "Memset"))]
    return {
        "kernels": len(kernels),
        "launches": sum(event.name() in LAUNCH for event in events),
        "device_seconds": sum(event.duration_ns() for event in on_device) / 1e9,
        "attention_seconds": sum(e.duration_ns() for e in kernels if "flex_attention" in e.name()) / 1e9,
    }
