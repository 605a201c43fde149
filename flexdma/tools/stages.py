"""The time of each stage of a call, and of the whole call.

gather, eager: each stage is timed inside the running operator (Ledger), with the caches as they are there.  flex, compiled:
each stage is called alone, and on CUDA compiled alone, because fused stages cannot be separated; the sum may then exceed the
whole.  Backward: timed after a new forward each time, with and without the gate's gradient.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from flexdma import ValueGate, causal_top_w, dynamic_mask_attention
from flexdma.lifespans import by_rank
from flexdma.lowerings.default_options import device_options, with_defaults
from flexdma.lowerings.packed_keys import at_places
from flexdma.lowerings.reference_gate import largest_so_far
from flexdma.opaque import realize
from flexdma.packing import pack, packed_layout
from flexdma.packing.block_index import BlockIndex, block_index
from flexdma.packing.rows import FoldedRows
from flexdma.packing.schedule import schedule
from flexdma.stages import observed
from flexdma.tools.shapes import Shape, default_blocks_and_rows
from flexdma.tools.timing import Measured, Prepared, Turns, backward_of, interleaved
from flexdma.tools.whole_calls import Compile, compile_whole

WHOLE, GATE, RANKING, LIFESPANS, REFERENCE = "whole", "gate", "ranking", "lifespans", "reference gates"
PACKING, METADATA, LIVING, TAKE = "packing", "mask metadata", "living keys", "key/value gather"
FORWARD, BACKWARD, GATE_GRADIENT, GATE_BACKWARD = (
    "attention forward", "attention backward", "gate gradient", "gate, its own backward",
)  # fmt: skip
IN_STAGES = "in stages"
RANKING_AND_LIFESPANS = (RANKING, LIFESPANS)
BEFORE_ATTENTION = {
    "gather": (RANKING, LIFESPANS, REFERENCE, LIVING),
    "flex": (RANKING, LIFESPANS, REFERENCE, PACKING, METADATA),
}


@dataclass
class Ledger:
    """Seconds of every run by stage, without the stages called inside it."""

    runs: list[dict[str, float]] = field(default_factory=list)
    _open: list[float] = field(default_factory=list)  # seconds in inner stages, for each open stage

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside to the stage `name`."""
        self._open.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - start
            inside = self._open.pop()
            if self.runs:
                self.runs[-1][name] = self.runs[-1].get(name, 0.0) + taken - inside
            if self._open:
                self._open[-1] += taken

    def medians(self, counted: int) -> dict[str, float]:
        """Medians by stage over the last `counted` runs; earlier runs warm up and measure memory."""
        runs = self.runs[len(self.runs) - counted :]
        return {name: median(run.get(name, 0.0) for run in runs) for name in (runs[0] if runs else {})}


def profile(
    shape: Shape, tensors: list[Tensor], lowering: str, turns: Turns, compiler: Compile = compile_whole
) -> Measured:
    """Time and memory of gate and attention, by stage, and of the WHOLE call.

    lowering: "gather", called eagerly, or "flex", compiled.
    """
    query, key, value, _ = (tensor.detach().requires_grad_(shape.backward) for tensor in tensors)
    module = ValueGate(shape.heads, shape.size).to(query.device)
    torch.nn.init.normal_(module.A)  # with the initial A = 0 all gates are equal
    compiled = lowering == "flex"
    call = compiler(dynamic_mask_attention) if compiled else dynamic_mask_attention
    options: dict[str, Any] = {"window_size": shape.window, "lowering": lowering}

    def forward(gate: Tensor | None = None) -> Tensor:
        return call(query, key, value, module(value) if gate is None else gate, **options)

    def whole() -> None:
        with torch.set_grad_enabled(shape.backward):
            output = forward()
            if shape.backward:
                backward_of(output, (query, key, value, *module.parameters()))

    ledger = Ledger()

    def in_stages() -> None:
        ledger.runs.append({})
        with torch.set_grad_enabled(shape.backward), observed(ledger.stage):
            with ledger.stage(GATE):
                gate = module(value)
            forward(gate)

    calls: dict[str, Any] = {WHOLE: whole}
    with torch.no_grad():
        gate = module(value)
    if compiled:
        calls |= _flex_stages(shape, (query, key, value), module, gate, compiler)
    else:
        calls[IN_STAGES] = in_stages
    if shape.backward:
        calls |= _backward_stages(query, key, value, module, gate, forward)
    measured = interleaved(calls, turns)
    return _by_stage(lowering, measured, ledger)


def _backward_stages(
    query: Tensor, key: Tensor, value: Tensor, module: ValueGate, gate: Tensor, forward: Callable[[Tensor], Tensor]
) -> dict[str, Prepared]:
    without, leaf = gate.detach(), gate.detach().requires_grad_()

    def attention_backward(gate: Tensor) -> Prepared:
        return Prepared(lambda: forward(gate), lambda output: backward_of(output, (query, key, value, gate)))

    return {
        BACKWARD: attention_backward(without),
        "with gate gradient": attention_backward(leaf),
        GATE_BACKWARD: Prepared(
            lambda: module(value), lambda output: backward_of(output, (value, *module.parameters()))
        ),
    }


def _flex_stages(
    shape: Shape, qkv: tuple[Tensor, ...], module: ValueGate, gate: Tensor, compiler: Compile
) -> dict[str, Callable[[], object]]:
    query, key, value = (tensor.detach() for tensor in qkv)
    block_size, rows = default_blocks_and_rows(shape, query.device, query.dtype)
    layout = packed_layout(shape.length, shape.length, shape.window, block_size=block_size, group=rows.per_position)
    with torch.no_grad():
        alive = causal_top_w(gate, shape.window)
        reference = largest_so_far(gate, alive)
        packing, index = schedule(
            alive, rows=rows, capacity=shape.window, block_size=block_size, transposed=shape.backward
        )
        moved = [at_places(tensor, packing, needs_gradient=False) for tensor in (key, value, gate)]
    attend = compiler(_packed_attention)
    alone = compiler if query.is_cuda else (lambda function: function)  # on a CPU the stages are opaque operators
    take = alone(lambda *tensors: [at_places(tensor, packing, needs_gradient=False) for tensor in tensors])

    def listed(birth: Tensor, death: Tensor) -> list[Tensor]:
        return block_index(
            birth, death, rows=rows, block_size=block_size, transposed=shape.backward, periods=layout.periods,
            period=layout.period,
        ).tensors()  # fmt: skip

    stages: dict[str, tuple[Callable, tuple]] = {
        GATE: (module, (value,)),
        RANKING: (alone(lambda gate: by_rank(gate, None)), (gate,)),
        "selection": (alone(causal_top_w), (gate, shape.window)),
        REFERENCE: (alone(largest_so_far), (gate, alive)),
        PACKING: (alone(lambda alive: pack(alive, layout, queries=shape.length)), (alive,)),
        METADATA: (alone(listed), (packing.birth, packing.death)),
        TAKE: (take, (key, value, gate)),
        FORWARD: (
            attend,
            (query, *moved, reference, packing.birth, packing.death, index, rows, block_size, shape.backward),
        ),
    }

    def without_gradient(function: Callable, arguments: tuple) -> object:
        with torch.no_grad():
            return function(*arguments)

    return {name: functools.partial(without_gradient, *stage) for name, stage in stages.items()}


def _packed_attention(
    query: Tensor, key: Tensor, value: Tensor, gate: Tensor, reference: Tensor, birth: Tensor, death: Tensor,
    index: BlockIndex, rows: FoldedRows, block_size: tuple[int, int], trains: bool,
) -> Tensor:  # fmt: skip
    """FlexAttention on packed keys: the forward kernel of the flex lowering, with folding and unfolding of rows."""
    heads = key.shape[1]
    gate, reference, birth, death = (realize(tensor) for tensor in (gate, rows.of_rows(reference), birth, death))

    def score_mod(score: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return score + (gate[b, h, column] - reference[b, h, row])

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        i = rows.position(row)
        return (i >= birth[b, h, column]) & (i < death[b, h, column])

    mask = index.block_mask((rows.total, key.shape[2]), block_size, mask_mod)
    folded = realize(rows.folded(query, heads))
    call = (query.device, query.dtype, query.shape[-1], rows.group, trains)
    options = None if query.device.type == "cpu" else with_defaults(None, device_options(*call, True), block_size)
    output = flex_attention(folded, key, value, score_mod=score_mod, block_mask=mask, kernel_options=options)  # type: ignore[arg-type]
    return rows.unfolded(output).transpose(2, 3).flatten(1, 2)


def _by_stage(lowering: str, measured: Measured, ledger: Ledger) -> Measured:
    """Stages from measurements: lifespans = selection - ranking, gate gradient = backward with it - backward without."""
    found = measured.seconds | ledger.medians(measured.rounds.get(IN_STAGES, 0))
    if "selection" in found and RANKING in found:
        found[LIFESPANS] = found["selection"] - found[RANKING]
    if "with gate gradient" in found and BACKWARD in found:
        found[GATE_GRADIENT] = found["with gate gradient"] - found[BACKWARD]
    peaks = measured.peak_bytes
    if "selection" in peaks:
        peaks[LIFESPANS] = peaks["selection"]
    names = (
        WHOLE, GATE, *BEFORE_ATTENTION[lowering], TAKE, FORWARD, BACKWARD, GATE_GRADIENT, GATE_BACKWARD,
    )  # fmt: skip
    return Measured(
        seconds={name: found[name] for name in names if name in found},
        peak_bytes={name: peaks[name] for name in names if name in peaks},
        failed=measured.failed,
    )
