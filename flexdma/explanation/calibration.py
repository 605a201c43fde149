"""The cost model's rates, measured on the machine at hand: one shape, contenders interleaved, medians."""

import torch
from torch import Tensor

from flexdma.bench import report
from flexdma.bench.cases import Shape, contenders, inputs, stages
from flexdma.bench.timing import interleaved
from flexdma.block_metadata import block_metadata
from flexdma.explanation.costs import Problem, Rates, causal_cost, gather_cost, sorted_keys
from flexdma.explanation.counts import packed
from flexdma.lifespans import causal_top_w
from flexdma.lowerings.flex import BLOCK_SIZE

# Long enough that attention, not launching kernels, is what takes the time.
SHAPES = {"cpu": (4096, 256, 8, 2, 64, torch.float32), "cuda": (16384, 1024, 16, 4, 128, torch.bfloat16)}
STAGES = {"gather": ("selection", "living keys"), "flex": ("selection", "packing", "block mask")}
EAGER, COMPILED, CAUSAL = "flexdma (default, eager call)", "flexdma flex, compiled", "SDPA causal"


def measured_rates(device: str, rounds: int = 5) -> dict[tuple[str, str], Rates]:
    """(device, phase) -> Rates, as `explain(rates=...)` takes them.  A minute on a CPU, most of it compilation."""
    length, window, query_heads, heads, size, dtype = SHAPES[device]
    machine = report.machine(device)
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    measured_on = f"{machine['device']}{threads}, torch {machine['torch']}, {str(dtype).removeprefix('torch.')}"
    measured_on += f", N={length} w={window} D={size}"
    rates = {}
    for phase in ("inference", "training"):
        shape = Shape(length, window, phase == "training", query_heads, heads, size)
        tensors = inputs(shape, device, dtype)
        # On CUDA the default is flex, so that gather has no contender of its own there.
        wanted = {CAUSAL, COMPILED} if device == "cuda" else {CAUSAL, EAGER, COMPILED}
        calls = {name: call for name, call in contenders(shape, tensors).items() if name in wanted}
        seconds = interleaved(calls, rounds, lambda name: None)
        parts = {name: call for name, call in stages(shape, tensors).items() if "whole" not in name}
        rates[device, phase] = rates_from(
            shape, seconds, interleaved(parts, rounds, lambda name: None), visited_pairs(shape, tensors[3]), measured_on
        )
    return rates


def rates_from(
    shape: Shape, seconds: dict[str, float], stage_seconds: dict[str, float], visited: float, measured_on: str
) -> Rates:
    """The rates under which the cost model gives these seconds for this shape."""
    problem = Problem(shape.length, shape.window, 0, shape.query_heads // shape.heads, visited)
    sorting = sorted_keys(problem) * shape.heads
    selection = {name: sum(stage_seconds[part] for part in parts) * 1e9 for name, parts in STAGES.items()}
    one = Rates(measured_on, 1.0, 1.0, 0.0, 1.0, 0.0)
    gather = flex = None
    if EAGER in seconds:
        gather = (seconds[EAGER] * 1e9 - selection["gather"]) / (gather_cost(one, problem) * shape.heads)
    if COMPILED in seconds:
        pairs = shape.query_heads * shape.length * visited
        flex = (seconds[COMPILED] * 1e9 - selection["flex"]) / pairs
    return Rates(
        measured_on,
        causal=seconds[CAUSAL] * 1e9 / (causal_cost(one, problem) * shape.heads),
        gather=gather,
        gather_selection=selection["gather"] / sorting,
        flex=flex,
        flex_selection=selection["flex"] / sorting,
    )


def visited_pairs(shape: Shape, gate: Tensor) -> float:
    """Pairs in the packed blocks that are visited, per query and query head."""
    rows, columns = BLOCK_SIZE[gate.device.type]
    group = shape.query_heads // shape.heads
    alive = packed(causal_top_w(gate, shape.window), shape.window)
    partial, _, full, _ = block_metadata(*alive, shape.length, group, rows, columns, False)
    return (partial + full).sum().item() * rows * columns / (shape.query_heads * shape.length)
