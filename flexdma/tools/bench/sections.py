"""The sections of a suite, and the functions that measure their cases as rows (contender, metric, value)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from flexdma import causal_top_w, dynamic_mask_attention
from flexdma.lowerings.default_options import BLOCK_SIZE
from flexdma.packing.rows import FoldedRows
from flexdma.tools.bench.contenders import contenders
from flexdma.tools.bench.decoding import LAYER_TOKENS, Decoder, layer_calls, timed_tokens
from flexdma.tools.bench.decoding_models import MODEL_TOKENS, model_calls, prefill_calls
from flexdma.tools.bench.gradients import gate_gradient_routes
from flexdma.tools.bench.launches import device_work
from flexdma.tools.bench.mask_contenders import BUILT, DECIDING, FAMILIES, MASK_SIZES
from flexdma.tools.bench.mask_sections import BUILDING, CALLS, measure_mask_building, measure_masks
from flexdma.tools.bench.masks import build_masks
from flexdma.tools.bench.suites import Suite
from flexdma.tools.bench.visited import VISITED, packing_ratios, visited_over_ideal
from flexdma.tools.machine import machine
from flexdma.tools.records import Results
from flexdma.tools.shapes import Shape, inputs
from flexdma.tools.stages import profile
from flexdma.tools.timing import SIZE_ROUNDS, Turns, in_one_line, interleaved, peak_bytes
from flexdma.tools.whole_calls import CAUSAL, Compile, compile_whole, sdpa_causal

FLEXDMA, SELECTION = "flexdma", "selection"
# SDPA is quadratic: at larger lengths a CPU takes minutes, and a GPU uses up the time of later cases.
SDPA_LONGEST = {"cpu": 32768, "cuda": 262144}
ONCE = 131072  # at larger lengths a CPU runs a call once, without a warm-up, because it compiles nothing here
LAUNCHED = {"compiled": {}, 'compiled, mode="reduce-overhead"': {"mode": "reduce-overhead"}}
Row = tuple[str, str, Any]
Rows = Iterator[Row]


@dataclass(frozen=True)
class Setting:
    """The setting of all cases of a suite."""

    device: str
    dtype: torch.dtype
    threads: int | None = None  # of a CPU; None = PyTorch's default
    compiler: Compile = compile_whole

    def inputs(self, shape: Shape) -> list[torch.Tensor]:
        """Inputs of this shape in this setting."""
        return inputs(shape, self.device, self.dtype)


class Planned(NamedTuple):
    """A case to measure.  It can be pickled, because its own process measures it."""

    section: str
    title: str
    measure: Callable[[Setting, Turns], Rows]

    def __str__(self) -> str:
        return f"{self.section}: {self.title}"


def begun(suite: Suite, name: str, rounds: int, setting: Setting) -> Results:
    """The results of a suite before its first case."""
    about = {
        "machine": machine(setting.device), "suite": name, "device": setting.device,
        "dtype": str(setting.dtype).removeprefix("torch."), "rounds": rounds, **_sizes(suite, setting.device),
    }  # fmt: skip
    return Results(about, {str(shape): shape for shape in suite.shapes()})


def _sizes(suite: Suite, device: str) -> dict[str, str]:
    """The sizes of a suite that all its cases share, for the first line of the report."""
    if suite.masks:
        return {"heads": str(MASK_SIZES[device])}
    if suite.calls:
        shape = suite.calls[0]
        return {"heads": f"Hq={shape.query_heads} Hkv={shape.heads} D={shape.size}, iid gates"}
    one = suite.decoding[0][1]
    return {
        "batch": "a Llama of SmolLM2-135M's shape with random weights", "heads": f"{one.layers} layers, "
        f"Hq={one.query_heads} Hkv={one.heads} D={one.size}, w={one.window} and {one.sinks} sinks, equal gates",
    }  # fmt: skip


def planned(suite: Suite, device: str) -> Iterator[Planned]:
    """The cases of a suite, the most important first."""
    yield from _each("calls", suite.calls, measure_calls)
    lowering = "flex" if device == "cuda" else "gather"
    yield from _each(f"gate gradient of {lowering}", suite.gate_gradient, measure_gradient, lowering)
    yield from _each("lengths", suite.lengths, measure_size, True)
    for lowering, shape in suite.stages:
        yield from _each(f"stages of {lowering}", (shape,), measure_stages, lowering)
    yield from _each("others", suite.others, measure_calls)
    yield from _each("launches", suite.launches, measure_launches)
    yield from _each("windows", suite.windows, measure_size, False)
    for section, decoder in suite.decoding:
        yield from _each(section, (decoder,), measure_decoding, section)
    if suite.masks:
        yield from _each(CALLS, FAMILIES[:DECIDING], measure_masks)
        yield from _each(BUILDING, BUILT, measure_mask_building)
        yield from _each(CALLS, FAMILIES[DECIDING:], measure_masks)
    if not suite.calls:
        return
    length, window = suite.packing
    tiles = {
        f"the {device.upper()} kernel's tiles,": (
            rows // FoldedRows.of(length, suite.calls[0].group, rows, device).per_position,
            keys,
        )
        for device, (rows, keys) in BLOCK_SIZE.items()
    }
    for whose, tile in tiles.items():
        title = f"N={length} w={window}, {whose} {tile[0]} positions x {tile[1]} keys"
        yield Planned("packing", title, partial(measure_packing, length, window, tile))
    yield from _each(
        "memory", {(s.length, s.window): s for s in suite.calls if not s.backward}.values(), measure_memory
    )


def _each(section: str, shapes: Any, measure: Callable, *options: object) -> Iterator[Planned]:
    return (Planned(section, str(shape), partial(measure, shape, *options)) for shape in shapes)


def measure_calls(shape: Shape, setting: Setting, turns: Turns) -> Rows:
    """Whole calls by all contenders."""
    tensors = setting.inputs(shape)
    yield from interleaved(contenders(shape, tensors, setting.compiler), turns).rows()
    turns.tick("")
    try:
        for name, ratio in visited_over_ideal(shape, tensors[3].detach(), tensors[0].dtype).items():
            yield name, VISITED, ratio
    except RuntimeError as error:  # out of memory; the times above are kept
        yield "visited / ideal", "failed", in_one_line(error)


def measure_gradient(shape: Shape, lowering: str, setting: Setting, turns: Turns) -> Rows:
    """The backward, by route of the gate's gradient."""
    yield from gate_gradient_routes(shape, setting.inputs(shape), lowering, turns, setting.compiler).rows()


def measure_stages(shape: Shape, lowering: str, setting: Setting, turns: Turns) -> Rows:
    """Time by stage."""
    yield from profile(shape, setting.inputs(shape), lowering, turns, setting.compiler).rows()


def measure_size(shape: Shape, selects: bool, setting: Setting, turns: Turns) -> Rows:
    """One N and w: the whole forward, causal SDPA, and where `selects` the selection."""
    query, key, value, gate = tensors = setting.inputs(shape)
    attend, select = dynamic_mask_attention, causal_top_w
    if query.is_cuda:
        attend, select = setting.compiler(attend), setting.compiler(select)  # type: ignore[assignment]
    calls: dict[str, Callable[[], object]] = {FLEXDMA: partial(attend, *tensors, window_size=shape.window)}
    if selects:
        calls[SELECTION] = partial(select, gate, shape.window)
    if shape.length <= SDPA_LONGEST[query.device.type]:
        # The first backend is flash; "calls" compares it with the others.
        calls[CAUSAL] = next(iter(sdpa_causal(query, key, value).values()))
    once = not query.is_cuda and shape.length > ONCE
    turns = replace(turns, rounds=1 if once else min(turns.rounds, SIZE_ROUNDS))
    with torch.no_grad():
        measured = interleaved(calls, turns, memory=query.is_cuda, warm_up=not once)
    yield from measured.rows()


def measure_launches(shape: Shape, setting: Setting, turns: Turns) -> Rows:
    """Seconds and launches of the forward, compiled with and without CUDA graphs."""
    tensors = setting.inputs(shape)
    calls = {
        name: partial(setting.compiler(dynamic_mask_attention, **options), *tensors, window_size=shape.window)
        for name, options in LAUNCHED.items()
    }
    with torch.no_grad():
        measured = interleaved(calls, turns, host=True)
    yield from measured.rows()
    for name in measured.seconds:
        turns.tick(name)
        with torch.no_grad():
            work = device_work(calls[name])
        yield from ((name, metric, value) for metric, value in work.items())


def measure_decoding(decoder: Decoder, section: str, setting: Setting, turns: Turns) -> Rows:
    """Seconds of one token against each context, or of the prefill, with full caches and with states."""
    make, tokens = {
        "decode layers": (layer_calls, LAYER_TOKENS),
        "decode models": (model_calls, MODEL_TOKENS),
        "prefill": (prefill_calls, 1),
    }[section]
    torch.manual_seed(0)
    yield from timed_tokens(make(decoder, setting.dtype), tokens, turns)


def measure_packing(length: int, window: int, tile: tuple[int, int], setting: Setting, turns: Turns) -> Rows:
    """Visited blocks over the ideal, by family of gates, in tiles of (positions, keys)."""
    for family, (natural, packed) in packing_ratios(length, window, *tile).items():
        yield family, "natural order", natural
        yield family, "packed", packed


def measure_memory(shape: Shape, setting: Setting, turns: Turns) -> Rows:
    """Peak memory of building masks and metadata, by lowering."""
    gate = inputs(shape, setting.device, torch.float32)[3].detach()
    for lowering in ("flex", "gather"):
        yield lowering, "peak_bytes", peak_bytes(partial(build_masks, lowering, shape, gate, setting.dtype))
