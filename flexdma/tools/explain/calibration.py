"""The cost model's rates, measured on this machine or fitted to results of the benchmark.

`python -m flexdma explain --calibrate` measures them, `python -m flexdma explain --fit FILE` fits and prints them.
"""

from collections.abc import Mapping
from dataclasses import fields
from math import exp, log
from typing import Any

import torch
from torch import Tensor

from flexdma.lifespans import causal_top_w
from flexdma.lowerings.default_options import default_block_size
from flexdma.packing.rows import FoldedRows
from flexdma.tools.cost_model import counts
from flexdma.tools.cost_model.measured import Rates, sorted_keys
from flexdma.tools.cost_model.pairs import gathered_pairs, shown_pairs
from flexdma.tools.machine import machine
from flexdma.tools.records import Results
from flexdma.tools.shapes import Shape, inputs
from flexdma.tools.stages import BEFORE_ATTENTION, profile
from flexdma.tools.timing import Turns, interleaved
from flexdma.tools.whole_calls import CAUSAL, COMPILED, EAGER, as_steps, fastest_causal, whole_calls

# Long enough that attention takes most of the time, not kernel launches.
SHAPES = {"cpu": (4096, 256, 8, 2, 64, torch.float32), "cuda": (16384, 1024, 16, 4, 128, torch.bfloat16)}
LOWERINGS = {"cpu": ("gather", "flex"), "cuda": ("flex",)}  # on CUDA the default is flex, and gather is not a contender
PHASES = ("inference", "training")


def measured_rates(device: str, rounds: int = 5) -> dict[tuple[str, str], Rates]:
    """(device, phase) -> Rates, for `explain(rates=...)`.  Takes a minute on a CPU, mostly for compilation."""
    length, window, query_heads, heads, size, dtype = SHAPES[device]
    forward, both = (Shape(length, window, backward, query_heads, heads, size) for backward in (False, True))
    measured_on = f"{_where(machine(device), dtype)}, N={length} w={window} D={size}"
    turns, tensors = Turns(rounds), inputs(forward, device, dtype)
    profiles = {name: profile(forward, tensors, name, turns).seconds for name in LOWERINGS[device]}
    selection = selection_rates(profiles, forward)
    rates = {}
    for phase, shape in zip(PHASES, (forward, both), strict=True):
        tensors = inputs(shape, device, dtype)
        with_rates = (CAUSAL, EAGER, COMPILED)
        calls = {name: call for name, call in whole_calls(shape, tensors).items() if name.startswith(with_rates)}
        seconds = interleaved(as_steps(calls, shape, tensors), turns, memory=False).seconds
        rates[device, phase] = rates_from(
            shape, seconds, selection, visited_pairs_per_query(shape, tensors[3], device), measured_on
        )
    return rates


def fitted_rates(results: Results) -> dict[tuple[str, str], Rates]:
    """(device, phase) -> Rates that fit the results of `python -m flexdma bench --out FOLDER`.

    Each rate is the geometric mean over the shapes of its phase.  Raises ValueError where a part is missing.
    """
    about, staged = results.about, results.cases("stages")
    if not staged:
        raise ValueError("results: expected stages, got none")
    first = staged[0].shape
    profiles = {case.section.removeprefix("stages of "): case.seconds for case in staged if case.shape == first}
    selection = selection_rates(profiles, first)
    found: dict[str, list[Rates]] = {}
    for case in results.cases("calls"):
        shape = case.shape
        gate = inputs(shape, "cpu", torch.float32)[3].detach()
        visited = visited_pairs_per_query(shape, gate, about["device"])
        where = f"{_where(about['machine'], about['dtype'])}, D={shape.size}"
        rates = rates_from(shape, case.seconds, selection, visited, where)
        found.setdefault(PHASES[shape.backward], []).append(rates)
    return {(about["device"], phase): geometric_mean(found[phase]) for phase in PHASES if phase in found}


def selection_rates(stages: Mapping[str, Mapping[str, float]], shape: Shape) -> dict[str, float]:
    """Lowering -> nanoseconds per N log2 N key of a KV head, for all stages before attention."""
    sorting = sorted_keys(shape.length) * shape.heads
    return {
        lowering: sum(seconds[stage] for stage in BEFORE_ATTENTION[lowering]) * 1e9 / sorting
        for lowering, seconds in stages.items()
    }


def rates_from(
    shape: Shape, seconds: Mapping[str, float], selection: Mapping[str, float], visited: float, measured_on: str
) -> Rates:
    """The rates with which the cost model gives these seconds for this shape.  selection: see `selection_rates`."""
    sorting = sorted_keys(shape.length) * shape.heads
    causal = fastest_causal(dict(seconds))
    if causal is None:
        raise ValueError(f"seconds: expected {CAUSAL!r} of {shape}, got {sorted(seconds)}")
    gather = flex = None
    if EAGER in seconds:
        attending = seconds[EAGER] * 1e9 - selection["gather"] * sorting
        gather = attending / (shape.query_heads * float(gathered_pairs(shape.length, shape.window)))
    if COMPILED in seconds:
        attending = seconds[COMPILED] * 1e9 - selection["flex"] * sorting
        flex = attending / (shape.query_heads * shape.length * visited)
    return Rates(
        measured_on,
        causal=causal * 1e9 / (shape.query_heads * float(shown_pairs(shape.length, shape.length))),
        gather=gather,
        gather_selection=selection.get("gather", 0.0),
        flex=flex,
        flex_selection=selection.get("flex", 0.0),
    )


def visited_pairs_per_query(shape: Shape, gate: Tensor, device: str) -> float:
    """Pairs in the packed blocks that this type of device visits, per query and query head."""
    size = default_block_size(device)
    rows = FoldedRows.of(shape.length, shape.group, size[0], device)
    alive = causal_top_w(gate, shape.window)
    return counts.visited_pairs(alive, rows, size, capacity=shape.window) / (shape.query_heads * shape.length)


def _where(machine: Mapping[str, Any], dtype: object) -> str:
    threads = f", {machine['threads']} threads" if machine["threads"] else ""
    return f"{machine['device']}{threads}, torch {machine['torch']}, {str(dtype).removeprefix('torch.')}"


def geometric_mean(rates: list[Rates]) -> Rates:
    """The geometric mean of each rate; None where no phase has it, 0 where it was not measured."""

    def mean(name: str) -> float | None:
        values = [value for one in rates if (value := getattr(one, name)) is not None]
        if not values or not all(values):
            return 0.0 if values else None
        return exp(sum(map(log, values)) / len(values))

    names = [field.name for field in fields(Rates) if field.name != "measured_on"]
    return Rates(rates[0].measured_on, **{name: mean(name) for name in names})  # type: ignore[arg-type]
