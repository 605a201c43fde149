"""Record every kernel that Inductor generates, with its number of launches and its grid.

Inductor writes one Python module per graph (forward, backward) with the kernels' sources and a `call` that launches them.
While `watching` is active each kernel is wrapped before the module gets it, so the report has the kernels that run.  The
same code works on a GPU, on a CPU and, without launching, on fake tensors.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flexdma import dynamic_mask_attention, lifespan_attention
from flexdma.tools.inspect.kernel import Kernel

# Appears in the stack trace of a node that an operator of flexdma calls.
CALLED_BY = tuple(f", in {operator.__name__}\n" for operator in (dynamic_mask_attention, lifespan_attention))
OTHER_CALL = re.compile(r"(?:torch\.ops\.)?((?:aten|extern_kernels|flexdma)\.[\w.]+)\(")


@dataclass
class Capture:
    """The kernels, modules and calls that were recorded."""

    kernels: list[Kernel] = field(default_factory=list)
    tuners: dict[int, Any] = field(default_factory=dict)  # index into kernels -> Inductor's object for a Triton kernel
    graphs: dict[str, list[str]] = field(default_factory=dict)
    calls: list[tuple[str, Callable, list, list]] = field(
        default_factory=list
    )  # phase, call, last inputs, last outputs
    uses_attention: bool = False
    cuda_graph_obstacles: list[str] = field(
        default_factory=list
    )  # reasons why mode="reduce-overhead" would not use CUDA graphs

    def other_calls(self) -> dict[str, list[str]]:
        """Phase -> operators that the generated modules call without generating a kernel."""
        return {
            phase: [name for module in modules for name in OTHER_CALL.findall(_call_body(module))]
            for phase, modules in self.graphs.items()
        }


@contextlib.contextmanager
def watching(*, launch: bool, device: str) -> Iterator[Capture]:
    """Record the kernels that Inductor generates.

    launch: False records grids without launching, with buffers on `device`.
    """
    from torch._inductor import config
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.graph import GraphLowering

    seen = Capture()
    phase = "forward"
    generate, compile_cpp = GraphLowering.compile_to_module, AsyncCompile.cpp_pybinding

    def recorded(name: str, language: str, source: str) -> Kernel:
        kernel = Kernel(name, phase, language, source)
        seen.kernels.append(kernel)
        return kernel

    def triton_kernel(self: Any, name: str, source: str, device_str: str = "cuda") -> "TritonLaunches":
        kernel = recorded(name, "Triton", source)
        tuner = getattr(PyCodeCache.load(source), name)
        seen.tuners[len(seen.kernels) - 1] = tuner
        return TritonLaunches(kernel, tuner, launch)

    def cpp_kernel(self: Any, argument_types: list[str], source: str) -> "CppLaunches":
        # In the source the name is always "kernel"; the name of the variable is found below.
        kernel = recorded("kernel", "C++", source)
        return CppLaunches(kernel, compile_cpp(self, argument_types, source))

    def compile_to_module(self: Any) -> Any:
        nonlocal phase
        phase = "backward" if self.is_backward else "forward"
        module: Any = generate(self)
        seen.cuda_graph_obstacles += _cuda_graph_obstacles(self)
        seen.uses_attention |= any(map(_is_attention, self.orig_gm.graph.nodes))
        seen.graphs.setdefault(phase, []).append(Path(module.__file__).read_text())
        namespace = getattr(module.call, "__func__", module.call).__globals__
        for name, value in namespace.items():
            if isinstance(value, CppLaunches):
                value.kernel.name = name
        if not launch:
            # Inductor's own versions of these two bypass fake tensors.
            namespace["empty_strided_cuda"] = lambda size, stride, dtype: torch.empty_strided(
                size, stride, dtype=dtype, device=device
            )
            namespace["reinterpret_tensor"] = lambda tensor, size, stride, offset=0: torch.as_strided(
                tensor, size, stride, offset + tensor.storage_offset()
            )
        module.call = _remembering(seen, phase, module.call)
        return module

    # A module that is already loaded would not be recorded, and later calls must not reuse a wrapped one.
    PyCodeCache.cache_clear()
    # With one thread kernels are compiled in this process, where they can be recorded.
    options = {"compile_threads": 1, "fx_graph_cache": False}
    with (
        config.patch(options),
        torch._functorch.config.patch(enable_autograd_cache=False),
        _replaced(AsyncCompile, "triton", triton_kernel),
        _replaced(AsyncCompile, "cpp_pybinding", cpp_kernel),
        _replaced(GraphLowering, "compile_to_module", compile_to_module),
    ):
        try:
            yield seen
        finally:
            PyCodeCache.cache_clear()


class TritonLaunches:
    """Replaces a Triton kernel in the generated module."""

    def __init__(self, kernel: Kernel, tuner: Any, launch: bool) -> None:
        self.kernel, self.tuner, self.launch = kernel, tuner, launch
        self._describe(tuner.configs[0])

    def run(self, *arguments: Any, stream: Any = None, **options: Any) -> Any:
        result = self.tuner.run(*arguments, stream=stream, **options) if self.launch else None
        if self.launch and self.tuner.launchers:
            self._describe(self.tuner.launchers[0].config)
        if self.kernel.grid is None:
            chosen = self.tuner.launchers[0].config if self.tuner.launchers else self.tuner.configs[0]
            self.kernel.grid = tuple(map(int, self.tuner._interpret_args_grid(arguments, chosen)[1]))
        self.kernel.launches += 1
        return result

    def _describe(self, chosen: Any) -> None:
        self.kernel.warps, self.kernel.stages = chosen.num_warps, chosen.num_stages
        self.kernel.block_sizes = {name: value for name, value in chosen.kwargs.items() if isinstance(value, int)}


class CppLaunches:
    """Replaces a compiled C++ function in the generated module."""

    def __init__(self, kernel: Kernel, function: Callable) -> None:
        self.kernel, self.function = kernel, function

    def __call__(self, *arguments: Any) -> Any:
        self.kernel.launches += 1
        return self.function(*arguments)


def _remembering(seen: Capture, phase: str, call: Callable) -> Callable:
    def remember(arguments: list) -> Any:
        inputs = list(arguments)
        outputs = call(arguments)
        seen.calls.append((phase, call, inputs, list(outputs)))
        return outputs

    return remember


def _cuda_graph_obstacles(graph: Any) -> list[str]:
    """Inductor's reasons against CUDA graphs: tensors on the CPU, operators that wait for the device, unknown sizes."""
    from torch._inductor.cudagraph_utils import check_multiple_devices_or_any_cpu_nodes
    from torch._inductor.utils import get_first_incompatible_cudagraph_node

    reasons = (
        check_multiple_devices_or_any_cpu_nodes(graph.device_node_mapping),
        get_first_incompatible_cudagraph_node(graph.orig_gm),
    )
    return [str(reason) for reason in reasons if reason is not None]


def _is_attention(node: torch.fx.Node) -> bool:
    """Whether the node is FlexAttention, an operator of flexdma, or an operator that flexdma's functions call."""
    called, trace = str(node.target), node.meta.get("stack_trace") or ""
    return "flex_attention" in called or "flexdma" in called or any(function in trace for function in CALLED_BY)


def _call_body(module: str) -> str:
    """The part of a generated module that launches kernels, after their sources."""
    return module[module.rfind("def call(") :]


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
