"""A program, not a test: generates kernels for sm_90, runs them in Triton's interpreter and prints errors as JSON lines.

test_kernels.py starts it once per group of cases, because the interpreter and the stand-ins for a CUDA device need their
own process.  Each case generates one kernel and runs it on several inputs, then with the gate dropped and with the mask
shifted, which must give large errors.
"""

import json
import re
import sys
import warnings
from typing import Any

import torch

from flexdma import dynamic_mask_attention
from flexdma.lifespans import causal_top_w, global_top_w
from flexdma.lowerings.gate_gradient import gate_gradient_route
from flexdma.packing.rows import FoldedRows
from flexdma.packing.schedule import schedule
from flexdma.reference import dense_dynamic_mask_attention
from flexdma.tools.inspect.kernel import Kernel
from tests.lowerings.triton_interpreter import InterpretedCall

# By default float32 tiles are 16 wide, for which the interpreter takes minutes.
WIDE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 64, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 64}
NAMES = ("out", "dq", "dk", "dv", "dgate", "dsink")


def squashed(score, b, h, q_idx, kv_idx):
    """A user's score_mod: squashed (without tanh, which the interpreter lacks), with a distance penalty per head."""
    return score / (1 + score.abs() / 4) - 0.01 * (h + 1) * (q_idx - kv_idx)


CASES: dict[str, dict[str, Any]] = {
    "causal, grouped, documents, float64 gates, float32, deterministic": {
        "shape": (1, 4, 2, 141, 141, 16), "dtype": "float32", "gate_dtype": "float64", "window_size": 40, "documents": True,
        "score_mod": squashed, "kernel_options": WIDE, "gates": ("random",), "deterministic": True,
    },
    "causal, few queries, a score_mod, float64 gates, float32": {
        "shape": (1, 4, 2, 21, 150, 16), "dtype": "float32", "gate_dtype": "float64", "window_size": 40,
        "score_mod": squashed, "kernel_options": WIDE, "gates": ("random",), "controls": True,
    },
    "causal, rows by head, the gate's gradient by a column, bfloat16": {
        "shape": (1, 4, 2, 256, 256, 24), "dtype": "bfloat16", "window_size": 40, "route": "column", "gates": ("random",),
    },
    "global, grouped, odd length, the gate's gradient by atomics, bfloat16": {
        "shape": (1, 4, 2, 201, 201, 32), "dtype": "bfloat16", "window_size": 180, "selection": "global",
        "gates": ("random",), "route": "atomics",
    },
    "causal, batch, few queries, learned sinks, bfloat16": {
        "shape": (2, 2, 2, 31, 190, 16), "dtype": "bfloat16", "window_size": 70, "gates": ("rising",),
        "sink_logits": True,
    },
    "causal, rows by head, small blocks, many periods, learned sinks, float32": {
        "shape": (1, 4, 2, 336, 336, 16), "dtype": "float32", "window_size": 4, "gates": ("random",), "block_size": (16, 16),
        "sink_logits": True, "kernel_options": dict.fromkeys(WIDE, 16),
    },
    "inference, batch, one KV head, blocks of 64 keys, several periods, bfloat16": {
        "shape": (2, 2, 1, 256, 256, 80), "dtype": "bfloat16", "window_size": 20, "training": False, "gates": ("random",),
    },
    "inference, one gate for all heads, bfloat16": {
        "shape": (1, 4, 2, 200, 200, 32), "dtype": "bfloat16", "window_size": 50, "gate_heads": 1, "training": False,
        "gates": ("random",),
    },
}  # fmt: skip


def inputs(shape, dtype, gate_dtype, gate_heads, documents, sink_logits, gates, generator):
    """Query, key, value, gate, and document ids or learned sinks for one run."""
    batch, query_heads, heads, queries, keys, size = shape
    query, key, value = (
        torch.randn(batch, n, length, size, generator=generator).to(dtype)
        for n, length in ((query_heads, queries), (heads, keys), (heads, keys))
    )
    gate = torch.randn(batch, gate_heads, keys, generator=generator, dtype=gate_dtype)
    if gates != "random":
        gate = gate.sort(-1, descending=gates == "falling").values
    if sink_logits:
        return [query, key, value, gate, torch.randn(query_heads, generator=generator)]
    if not documents:
        return [query, key, value, gate]
    return [
        query,
        key,
        value,
        gate,
        torch.tensor([0] * 37 + [1] * (keys - 50) + [2] * 13).expand(batch, keys).contiguous(),
    ]


def visited(gate, window_size, selection, shape, document_ids=None):
    """The numbers of partial and of full blocks that the kernels visit."""
    _, query_heads, heads, queries, *_ = shape
    select = causal_top_w if selection == "causal" else global_top_w
    alive = select(gate, window_size, document_ids=document_ids)
    rows = FoldedRows.of(queries, query_heads // heads, 128, "cuda")
    _, index = schedule(alive, rows=rows, capacity=window_size, block_size=(128, 128), transposed=False)
    return int(index.partial_num.sum()), int(index.full_num.sum())


def relative(got, want):
    """The largest difference, relative to the largest value."""
    return float((got.double() - want).abs().max() / want.abs().max())


def run(name, *, shape, dtype, gates, window_size, gate_dtype="float32", gate_heads=None, documents=False,
        selection="causal", score_mod=None, training=True, route="transposed", deterministic=False, kernel_options=None,
        block_size=None, controls=False, sink_logits=False):  # fmt: skip
    """Print one line per input."""
    dtype, gate_dtype = getattr(torch, dtype), getattr(torch, gate_dtype)
    generator = torch.Generator().manual_seed(0)
    options = {"window_size": window_size, "selection": selection, "score_mod": score_mod}

    def named(others):
        return {} if not others else {"sink_logits" if sink_logits else "document_ids": others[0]}

    def attend(query, key, value, gate, *others):
        return dynamic_mask_attention(
            query,
            key,
            value,
            gate,
            **named(others),
            lowering="flex",
            kernel_options=kernel_options,
            block_size=block_size,
            **options,
        )

    def reference(tensors, gradient):
        leaves = [t.detach().double().requires_grad_(training) for t in tensors if t.is_floating_point()]
        others = leaves[4:] if sink_logits else tensors[4:]
        output = dense_dynamic_mask_attention(*leaves[:4], **(named(others) | options))
        gradients = torch.autograd.grad(output, leaves, gradient.double()) if training else ()
        return [output.detach(), *gradients]

    def compare(kind, control=None):
        tensors = inputs(shape, dtype, gate_dtype, gate_heads or shape[2], documents, sink_logits, kind, generator)
        gradient = torch.randn(tensors[0].shape, generator=generator).to(dtype)
        got = call.run(tensors, gradient if training else None)
        want = reference(tensors, gradient)
        partial, full = visited(tensors[3], window_size, selection, shape, tensors[4] if documents else None)
        result = {"case": name, "gates": kind, "control": control, "partial_blocks": partial, "full_blocks": full}
        result["errors"] = {n: relative(a, b) for n, a, b in zip(NAMES, got, want, strict=False)}
        result["atomics"] = sum(len(kernel.atomic_lines) for kernel in call.seen.kernels)
        result["cuda_graph_obstacles"] = call.seen.cuda_graph_obstacles
        result["epsilon"] = torch.finfo(dtype).eps
        print(json.dumps(result), flush=True)

    example = inputs(shape, dtype, gate_dtype, gate_heads or shape[2], documents, sink_logits, "random", generator)
    torch.use_deterministic_algorithms(deterministic)
    with gate_gradient_route(route):
        call = InterpretedCall(attend, [t.requires_grad_(training and t.is_floating_point()) for t in example])
    for kind in gates:
        compare(kind)
    if controls:
        for control, change in (("gate dropped", without_gate), ("mask shifted", with_shifted_mask)):
            call.rewrite(change)
            compare("random", control)


def without_gate(kernel: Kernel) -> str:
    """The kernel with every gate it loads multiplied by 0."""
    lines = kernel.source.splitlines()
    for number in kernel.gate_lines:
        lines[number - 1] += " * 0.0"
    return "\n".join(lines)


def with_shifted_mask(kernel: Kernel) -> str:
    """The kernel with its mask_mod called for the row two further on (the same head, the next query)."""
    return re.sub(r"(IS_FULL_BLOCKS:\n\s+tmp\d+ = \((?:m|idx_m|m\[[^)]*|idx_m\[[^)]*)\))", r"\1 + 2", kernel.source)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*data pointer of FakeTensor.*")
    for case in sys.argv[1:]:
        run(case, **CASES[case])
