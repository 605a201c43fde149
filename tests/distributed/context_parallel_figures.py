"""The two tables of docs/distributed.md, measured: bytes that a rank receives, and the work of each rank.

python -m tests.distributed.context_parallel_figures
"""

import time
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

from flexdma import causal_top_w, dynamic_mask_attention
from flexdma.distributed import context_parallel_dynamic_mask_attention
from flexdma.lifespans import Selection
from flexdma.packing.rows import FoldedRows
from flexdma.state.carry import with_state_keys
from flexdma.state.joined import Run, empty_run, joined, run_of
from flexdma.tools.cost_model.counts import blocks
from flexdma.tools.gate_families import gate_families
from tests.distributed.processes import Ranks
from tests.distributed.received_bytes import ReceivedBytes

HEADS, SIZE = 2, 64
ATEN = torch.ops.aten


def tensors_of_rank(length: int, mesh: DeviceMesh) -> list[Tensor]:
    """Query, key, value [1, 2, n, 64] and gate of this rank, float32."""
    tokens = length // mesh.size()
    return [torch.randn(1, HEADS, tokens, SIZE, requires_grad=True) for _ in range(3)] + [torch.randn(1, HEADS, tokens)]


def received(method: str, length: int, window: int) -> tuple[int, int]:
    """Bytes that this rank receives in the forward and the backward pass."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    query, key, value, gate = tensors_of_rank(length, mesh)
    with ReceivedBytes() as forward:
        if method == "flexdma":
            gate = gate.requires_grad_()
            output = context_parallel_dynamic_mask_attention(query, key, value, gate, window_size=window, mesh=mesh)
        else:
            ring.set_rotate_method(method)
            ring._cp_options.enable_load_balance = False
            group, query, key, value = mesh.get_group(), query.detach(), key.detach(), value.detach()
            operator = ATEN._scaled_dot_product_flash_attention_for_cpu
            output, logsumexp = ring._templated_ring_attention(group, 2, operator, query, key, value, is_causal=True)
    with ReceivedBytes() as backward:
        if method == "flexdma":
            output.backward(torch.ones_like(output))
        else:
            operator, gradient = cast(Any, _flash_backward), torch.ones_like(output)
            ring._templated_ring_attention_backward(
                group, 2, operator, gradient, "grad_out", query, key, value, output, logsumexp, is_causal=True
            )
    return forward.count, backward.count


def _flash_backward(**arguments: Any) -> tuple[Tensor, ...]:
    return ATEN._scaled_dot_product_flash_attention_for_cpu_backward(dropout_p=0.0, **arguments)


def print_bytes(window: int = 1024) -> None:
    """MiB that the rank that receives most gets, for each method."""
    methods = {"alltoall": "ring", "allgather": "all-gather", "flexdma": "flexdma"}
    print("| ranks | tokens |", " | ".join(f"{name}, forward | backward" for name in methods.values()), "|")
    for count in (2, 4):
        with Ranks(count) as ranks:
            for length in (4096, 16384):
                cells = []
                for method in methods:
                    counts = ranks.run(received, method, length, window)
                    cells += [f"{max(one[index] for one in counts) / 2**20:.2f}" for index in (0, 1)]
                print(f"| {count} | {length:,} |", " | ".join(cells), "|")


def seen_by_rank(run: Run, gate: Tensor, window: int) -> tuple[int, int]:
    """Visible pairs, and visited 128 x 128 blocks of packed keys, of the queries after `run`."""
    nothing = gate.new_zeros(*gate.shape, SIZE)
    keys = with_state_keys(run.state, nothing, nothing, gate, None, None)
    held = keys.gate.shape[-1] - keys.new
    alive = causal_top_w(keys.gate, window)
    pairs = [(bound - held).clamp(0, keys.new).sum() for bound in alive]
    of_head = FoldedRows(alive.birth.shape[-1], group=1)
    visited = blocks(alive, of_head, (128, 128), window).visited()[..., held // 128 :].sum()
    return int(pairs[1] - pairs[0]), int(visited)


def milliseconds(run: Run, tensors: list[Tensor], window: int) -> float:
    """Of this thread, in the forward and the backward of the tokens after `run`."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    start = time.thread_time()
    dynamic_mask_attention(*leaves, window_size=window, state=run.state).sum().backward()
    return (time.thread_time() - start) * 1e3


def print_balance(ranks: int = 4, length: int = 16384, window: int = 1024) -> None:
    """Largest over mean work of contiguous parts, for each family of gates."""
    policy, tokens = Selection("causal", window), length // ranks
    print("| gates | visible pairs | visited blocks | time | milliseconds of each rank |")
    print(f"| all keys, causal | {(2 * ranks - 1) / ranks:.2f} | | | |")
    for name, row in gate_families(length).items():
        gate = row.float().expand(1, HEADS, -1).contiguous()
        tensors = [torch.randn(1, HEADS, length, SIZE) for _ in range(3)] + [gate]
        parts = [list(part) for part in zip(*(tensor.split(tokens, 2) for tensor in tensors), strict=True)]
        runs = [empty_run(tensors[1], tensors[2], gate, policy)]
        for _, key, value, own_gate in parts[:-1]:
            runs.append(joined(runs[-1], run_of(key, value, own_gate, policy, None, None)))
        seen = [seen_by_rank(run, part[3], window) for run, part in zip(runs, parts, strict=True)]
        rounds = [[milliseconds(run, part, window) for run, part in zip(runs, parts, strict=True)] for _ in range(8)]
        least = [min(times) for times in zip(*rounds, strict=True)]
        columns = [*zip(*seen, strict=True), least]
        over_mean = [f"{max(column) * ranks / sum(column):.2f}" for column in columns]
        print(f"| {name} |", " | ".join(over_mean), "|", ", ".join(f"{one:.0f}" for one in least), "|")


if __name__ == "__main__":
    print_bytes()
    print_balance()
