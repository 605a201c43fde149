"""A program, not a test: the bytes that Inductor's kernels for sm_90 move, as JSON.

Each line of standard input is a case.  Each line of standard output has its bytes by graph: [forward] or [forward, backward].
It counts the buffers that every generated kernel and every ATen call reads and writes, once each: the bytes that move if no
kernel reads twice and no cache keeps data between two kernels.  Nothing runs: tensors are fake, of any size, and kernels are
fused but not written.

`fitted_bytes.counted_bytes` starts it, because the stand-ins for a CUDA device need their own process.
"""

import json
import math
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import torch
from torch._inductor import config, ir
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode
from torch._subclasses.fake_tensor import FakeTensorMode

from flexdma import DynamicMaskState, dynamic_mask_attention
from flexdma.tools.inspect.call import run_once
from flexdma.tools.inspect.standins import install
from flexdma.tools.inspect.targets import known_target


def main() -> None:
    """Print the bytes of every case."""
    warnings.filterwarnings("ignore")
    install(known_target("sm_90"))
    graphs: list[int] = []

    def counting(graph: GraphLowering) -> SimpleNamespace:
        graph.init_wrapper_code()
        graph._update_scheduler()
        graphs.append(sum(moved(graph, node) for node in graph.scheduler.nodes))
        # In place of the generated module, the traced graph gives the shapes of its outputs.
        return SimpleNamespace(call=lambda inputs: list(graph.orig_gm(*inputs)), __file__="")

    GraphLowering.compile_to_module = counting  # type: ignore[assignment, method-assign]
    for line in sys.stdin:
        graphs.clear()
        torch._dynamo.reset()
        with config.patch(force_disable_caches=True), FakeTensorMode():
            generate(**json.loads(line))
        print(json.dumps(graphs), flush=True)


def moved(graph: GraphLowering, node: BaseSchedulerNode) -> int:
    """Inductor's count, except for two kinds of nodes, for which it is too small.

    In FlexAttention's backward it limits each buffer to the size of the keys' gradient.  And an ATen call such as
    `embedding_bag` writes all its outputs, also unused ones.
    """
    touched = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    if isinstance(node.node, ir.TemplateBuffer):
        touched = {name: nbytes(graph.name_to_buffer.get(name) or graph.graph_inputs[name]) for name in touched}
    elif isinstance(node.node, ir.FallbackKernel):
        touched[node.node.get_name()] = sum(map(nbytes, node.node.outputs))
    return sum(touched.values())


def nbytes(buffer: ir.IRNode) -> int:
    """Bytes of the whole buffer."""
    return math.prod(map(int, buffer.get_size())) * buffer.get_dtype().itemsize


def generate(shape: list[int], window: int, backward: bool = False, decode: bool = False) -> None:
    """Generate the kernels of one call in bfloat16.  decode: one token against a state of `window` slots."""
    batch, query_heads, heads, length, size = shape
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": backward}
    query, key, value = (torch.empty(batch, h, length, size, **options) for h in (query_heads, heads, heads))
    gate = torch.empty(batch, heads, length, device="cuda", requires_grad=backward)
    state = None
    if decode:
        state = DynamicMaskState.empty(batch, heads, size, window, dtype=torch.bfloat16, device="cuda")

    def call(*tensors: torch.Tensor) -> object:
        if decode:
            return dynamic_mask_attention(*tensors, window_size=window, state=state, return_state=True)
        return dynamic_mask_attention(*tensors, window_size=window, lowering="flex")

    with torch.set_grad_enabled(backward):
        run_once(call, (query, key, value, gate), {})


if __name__ == "__main__":
    main()
