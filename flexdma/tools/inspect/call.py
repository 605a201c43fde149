"""`inspect_kernels`: compile one call, forward and backward, and report the kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flexdma import checks
from flexdma.tools.inspect.capture import Capture, watching
from flexdma.tools.inspect.report import KernelReport
from flexdma.tools.inspect.targets import TARGETS, Target, known_target
from flexdma.tools.machine import triton_version
from flexdma.tools.model_calls import call_with_gradients, tensors_of

FIGURES = ("attention", "all", "none")


def inspect_kernels(
    fn_or_module: Callable | nn.Module, *args: Any, target: str | None = None, figures: str = "attention", **kwargs: Any
) -> KernelReport:
    """Report the kernels that Inductor generates for `fn_or_module(*args, **kwargs)`, and for its backward if it has one.

    target: None = the device of the tensors, CPU or GPU; the call is compiled and run there.  "sm_80", "sm_90", "sm_100",
        "gfx942": compile for that GPU, on a machine that needs no GPU.  Nothing runs, and only shapes, dtypes and
        requires_grad of tensors matter.  Another Python process does it, which must be able to import `fn_or_module`.
    figures: the Triton kernels to compile to machine code for registers, spills and other figures: "attention" (seconds
        each), "all" (a minute for the fifty small kernels of a selection), or "none".

    The backward is included where grad mode is on and an argument or a parameter requires a gradient.  The function is
    compiled again, without changing torch's compiled functions.

        report = flexdma.inspect_kernels(flexdma.dynamic_mask_attention, q, k, v, gate, window_size=512, target="sm_90")
        print(report); report.save("kernels"); print(report.diff(other))

    Returns a KernelReport.  Raises ValueError for an unknown target, or where the call uses neither FlexAttention nor
    flexdma.
    """
    if not callable(fn_or_module):
        raise TypeError(f"fn_or_module: expected a function or an nn.Module, got {type(fn_or_module).__name__}")
    checks.one_of("figures", figures, FIGURES)
    if target is not None:
        known_target(target)
        from flexdma.tools.inspect.remote import inspect_in_another_process

        return inspect_in_another_process(fn_or_module, args, kwargs, target, figures)
    devices = {leaf.device.type for leaf in tensors_of(fn_or_module, args, kwargs)} - {"cpu"}
    if devices - {"cuda"}:
        raise ValueError(f"args: expected tensors on a CPU or a CUDA device, got {', '.join(sorted(devices))}")
    with watching(launch=True, device="cpu") as seen:
        run_once(fn_or_module, args, kwargs)
    if not devices:
        return report_of(fn_or_module, seen, "CPU")
    return report_of(fn_or_module, seen, torch.cuda.get_device_name(), _target_of_this_device(), figures)


def run_once(fn_or_module: Callable | nn.Module, args: tuple, kwargs: dict) -> None:
    """Compile and call, then compute the gradients of all tensors that require one."""
    # A new backend, because Dynamo reuses compiled code of the same backend, and Inductor would then generate nothing.
    # Static shapes, as in a first call, also where the function was compiled for other shapes before.
    compiled = torch.compile(fn_or_module, backend=lambda graph, inputs: _inductor(graph, inputs), dynamic=False)
    call_with_gradients(compiled, fn_or_module, args, kwargs)


def report_of(
    fn_or_module: Callable | nn.Module, seen: Capture, device: str, target: Target | None = None, figures: str = "none"
) -> KernelReport:
    """The report of a capture; Triton kernels are compiled for `target` to read their figures."""
    if not seen.uses_attention:
        name = getattr(fn_or_module, "__qualname__", type(fn_or_module).__name__)
        found = f"{len(seen.kernels)} other kernels" if seen.kernels else "nothing that Inductor compiles"
        raise ValueError(
            f"fn_or_module: expected a function that calls flexdma or FlexAttention, but in {name} there is {found}"
        )
    if target is not None:
        from flexdma.tools.inspect.cubin import compiled_figures

        for index, tuner in seen.tuners.items():
            if figures == "all" or (figures == "attention" and seen.kernels[index].is_attention):
                seen.kernels[index].compiled = compiled_figures(tuner, target)
    return KernelReport(device, torch.__version__, triton_version(), seen.kernels, seen.other_calls(), seen.graphs)


def _inductor(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs)


def _target_of_this_device() -> Target:
    """The Target of this GPU, for the occupancy."""
    real: Any = torch.cuda.get_device_properties()
    if torch.version.hip is not None:
        return TARGETS["gfx942"]._replace(
            name=real.name, gfx=real.gcnArchName.split(":")[0], multiprocessors=real.multi_processor_count
        )
    known = TARGETS.get(f"sm_{real.major}{real.minor}", TARGETS["sm_90"])
    return known._replace(
        name=real.name,
        capability=real.major * 10 + real.minor,
        multiprocessors=real.multi_processor_count,
        shared_memory_per_multiprocessor=real.shared_memory_per_multiprocessor,
        threads_per_multiprocessor=real.max_threads_per_multi_processor,
        registers_per_multiprocessor=real.regs_per_multiprocessor,
    )
