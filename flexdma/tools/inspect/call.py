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
    """The kernels that Inductor generates for `fn_or_module(*args, **kwargs)`, and for its backward where one is needed.

    target: None: the device of the tensors, CPU or GPU; the call is compiled and run there.  "sm_80", "sm_90", "sm_100":
        the kernels for that GPU, on a machine that needs none; nothing runs, tensors count by shape, dtype and
        requires_grad alone.  This happens in another Python process, which must be able to import what is called.

    figures: which Triton kernels are compiled to machine code for their registers, spills and so on: "attention" (seconds
        each), "all" (a minute for the fifty small kernels of a selection), or "none".

    Gradients are asked for where grad mode is on and an argument or a parameter requires them.  The function is compiled
    afresh and torch's compiled functions stay as they are.

        report = flexdma.inspect_kernels(flexdma.dynamic_mask_attention, q, k, v, gate, window_size=512, target="sm_90")
        print(report); report.save("kernels"); print(report.diff(other))

    Raises ValueError for an unknown target, or where no FlexAttention or flexdma kernel appears.
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
    """Compile and call, then take the gradients of everything that asks for them."""
    # A backend of its own: Dynamo reuses compiled code only for the same backend, and there is then nothing to watch.
    # Static shapes, as for a first call, also where the function was compiled for others before.
    compiled = torch.compile(fn_or_module, backend=lambda graph, inputs: _inductor(graph, inputs), dynamic=False)
    call_with_gradients(compiled, fn_or_module, args, kwargs)


def report_of(
    fn_or_module: Callable | nn.Module, seen: Capture, device: str, target: Target | None = None, figures: str = "none"
) -> KernelReport:
    """What was seen as a report; Triton kernels are compiled for `target` and their figures read."""
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
    """The figures of the GPU at hand, for the occupancy."""
    real: Any = torch.cuda.get_device_properties()
    known = TARGETS.get(f"sm_{real.major}{real.minor}", TARGETS["sm_90"])
    return known._replace(
        name=real.name,
        capability=real.major * 10 + real.minor,
        multiprocessors=real.multi_processor_count,
        shared_memory_per_multiprocessor=real.shared_memory_per_multiprocessor,
        threads_per_multiprocessor=real.max_threads_per_multi_processor,
        registers_per_multiprocessor=real.regs_per_multiprocessor,
    )
