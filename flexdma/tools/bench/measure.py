"""Running a suite: one case after another, each result kept before the next begins.

A case that fails is recorded under "failed", one that the budget left no time for under "skipped"; neither loses the others.
The budget holds inside a case, too: see limits.py.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from flexdma import causal_top_w, dynamic_mask_attention
from flexdma.lowerings.flex import BLOCK_SIZE
from flexdma.tools.bench import masks
from flexdma.tools.bench.contenders import Compile, compile_whole, contenders, sdpa_causal, visited_over_ideal
from flexdma.tools.bench.gradients import gate_gradient_share
from flexdma.tools.bench.launches import device_work
from flexdma.tools.bench.limits import GRACE, Budget, TimeIsUpError
from flexdma.tools.bench.shapes import Shape, inputs
from flexdma.tools.bench.stages import profile
from flexdma.tools.bench.suites import Suite
from flexdma.tools.bench.timing import in_one_line, interleaved, peak_bytes, release
from flexdma.tools.machine import machine

SECTIONS = ("calls", "stages", "gate_gradient", "lengths", "others", "launches", "windows", "packing", "memory")
FLEXDMA, SDPA, SELECTION = "flexdma", "SDPA causal", "selection"
# Quadratic: beyond this a CPU takes minutes, and a GPU the time of the cases after it.
SDPA_LONGEST = {"cpu": 32768, "cuda": 262144}
ONCE = 131072  # the longest that a CPU, which compiles nothing here, is asked to run more than once
SIZE_ROUNDS = 3
RECOMPILE_LIMIT = 64  # one shape after another through the same code
Tick = Callable[[str], None]
Progress = Callable[[str, str, int, int], None]  # case, contender, how many cases are done, of how many
Case = tuple[str, str, Callable[[Tick], dict[str, Any]]]


def begun(suite: Suite, name: str, rounds: int, dtype: str, device: str) -> dict[str, Any]:
    """The results of a suite before its first case."""
    shape = suite.calls[0]
    return {
        "machine": machine(device), "suite": name, "dtype": dtype, "rounds": rounds,
        "heads": f"Hq={shape.query_heads} Hkv={shape.heads} D={shape.size}, iid gates",
        **{section: [] for section in SECTIONS}, "failed": {}, "skipped": [],
    }  # fmt: skip


def measure(
    suite: Suite,
    results: dict[str, Any],
    *,
    rounds: int,
    dtype: torch.dtype,
    device: str,
    budget: Budget,
    start: int = 0,
    compiler: Compile = compile_whole,
    save: Callable[[dict[str, Any]], None] = lambda results: None,
    progress: Progress = lambda title, name, done, of: None,
) -> None:
    """Fill `results`, which `begun` made, from case number `start` on; `save` is called after every case.

    budget.refused: contenders of case `start`.
    """
    cases = list(_cases(suite, rounds, dtype, device, compiler, budget))
    for done, (section, title, case) in list(enumerate(cases))[start:]:
        where = f"{section}: {title}"
        progress(where, "", done, len(cases))
        if budget.over:
            results["skipped"].append(where)
        else:
            tick = partial(_tick, progress, where, done, len(cases))
            try:
                with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
                    results[section].append(budget.clock.within(budget.left + GRACE, partial(case, tick)))
            except TimeIsUpError:
                results["skipped"].append(where)
            except Exception as error:  # whatever a kernel or a compiler may raise
                results["failed"][where] = in_one_line(error)
            torch._dynamo.reset()  # CUDA graphs keep their memory as long as what was compiled
            release()
        budget.refused = {}
        save(results)


def _tick(progress: Progress, where: str, done: int, of: int, name: str) -> None:
    progress(where, name, done, of)


def _cases(
    suite: Suite, rounds: int, dtype: torch.dtype, device: str, compiler: Compile, budget: Budget
) -> Iterator[Case]:
    """In order of importance."""

    def given(shape: Shape) -> list[torch.Tensor]:
        return inputs(shape, device, dtype)

    def call(shape: Shape, tick: Tick) -> dict[str, Any]:
        tensors = given(shape)
        measured = interleaved(contenders(shape, tensors, compiler), rounds, tick, budget)
        ratios: dict[str, float] = {}
        try:
            ratios = visited_over_ideal(shape, tensors[3].detach())
        except RuntimeError as error:  # memory that the contenders have left: their times are not lost
            measured.failed["visited / ideal"] = in_one_line(error)
        return {**_about(shape), **vars(measured), "visited_over_ideal": ratios}

    def stage(lowering: str, shape: Shape, tick: Tick) -> dict[str, Any]:
        return profile(shape, given(shape), lowering, rounds, tick, budget, compiler)

    def gradient(shape: Shape, tick: Tick) -> dict[str, Any]:
        lowering = "flex" if device == "cuda" else "gather"
        return gate_gradient_share(shape, given(shape), lowering, rounds, tick, budget, compiler)

    def size(shape: Shape, selects: bool, tick: Tick) -> dict[str, Any]:
        return _size(shape, given(shape), selects, rounds, tick, budget, compiler)

    def launch(shape: Shape, tick: Tick) -> dict[str, Any]:
        return _launches(shape, given(shape), rounds, tick, budget, compiler)

    yield from (("calls", str(shape), partial(call, shape)) for shape in suite.calls)
    if suite.gate_gradient is not None:
        yield "gate_gradient", str(suite.gate_gradient), partial(gradient, suite.gate_gradient)
    for shape in suite.lengths:
        yield "lengths", str(shape), partial(size, shape, True)
    for lowering, shape in suite.stages:
        yield "stages", f"{lowering}, {shape}", partial(stage, lowering, shape)
    yield from (("others", str(shape), partial(call, shape)) for shape in suite.others)
    if suite.launches is not None:
        yield "launches", str(suite.launches), partial(launch, suite.launches)
    for shape in suite.windows:
        yield "windows", str(shape), partial(size, shape, False)
    group = suite.calls[0].query_heads // suite.calls[0].heads
    tiles = {
        f"the {device.upper()} kernel's tiles,": (rows // group, keys) for device, (rows, keys) in BLOCK_SIZE.items()
    }
    for whose, (rows, columns) in {"blocks of": (128, 128), **tiles}.items():
        yield "packing", f"{rows} x {columns}", partial(_packing, *suite.packing, rows, columns, whose)
    for shape in {(s.length, s.window): s for s in suite.calls if not s.backward}.values():
        for lowering in ("flex", "gather"):
            yield "memory", f"masks, {lowering}, {shape}", partial(_memory, shape, lowering, device)


def _about(shape: Shape) -> dict[str, Any]:
    """Of the shape, for the report: the useful work of DMA, and that of causal attention to everything."""
    return {
        "shape": str(shape),
        "useful_flops": shape.useful_flops(),
        "causal_flops": shape.useful_flops("causal"),
    }


def _size(
    shape: Shape, tensors: list[torch.Tensor], selects: bool, rounds: int, tick: Tick, budget: Budget, compiler: Compile
) -> dict[str, Any]:
    """Time of one N and w: of the whole forward, of causal SDPA, and where `selects` of the selection."""
    query, key, value, gate = tensors
    cuda = query.is_cuda
    attend, select = dynamic_mask_attention, causal_top_w
    if cuda:
        attend, select = compiler(attend), compiler(select)  # type: ignore[assignment]
    calls: dict[str, Callable[[], object]] = {FLEXDMA: partial(attend, *tensors, window_size=shape.window)}
    if selects:
        calls[SELECTION] = partial(select, gate, shape.window)
    if shape.length <= SDPA_LONGEST[query.device.type]:
        # The first backend is flash: the others were compared under "calls".
        calls[SDPA] = next(iter(sdpa_causal(query, key, value).values()))
    once = not cuda and shape.length > ONCE
    with torch.no_grad():
        measured = interleaved(
            calls, 1 if once else min(rounds, SIZE_ROUNDS), tick, budget, memory=cuda, warm_up=not once
        )
    return {**_about(shape), "length": shape.length, "window": shape.window, **vars(measured)}


def _launches(
    shape: Shape, tensors: list[torch.Tensor], rounds: int, tick: Tick, budget: Budget, compiler: Compile
) -> dict[str, Any]:
    """Seconds and launches of the forward, and of the same replayed as a CUDA graph."""
    calls: dict[str, Callable[[], object]] = {
        "compiled": partial(compiler(dynamic_mask_attention), *tensors, window_size=shape.window),
        'compiled, mode="reduce-overhead"': partial(
            compiler(dynamic_mask_attention, mode="reduce-overhead"), *tensors, window_size=shape.window
        ),
    }
    with torch.no_grad():
        measured = interleaved(calls, rounds, tick, budget, host=True)
        work = {name: device_work(calls[name]) for name in measured.seconds}
    return {**_about(shape), **vars(measured), "device_work": work}


def _packing(length: int, window: int, rows: int, columns: int, whose: str, tick: Tick) -> dict[str, Any]:
    tile = f"{whose} {rows} positions x {columns} keys"
    return {
        "length": length,
        "window": window,
        "tile": tile,
        "ratios": masks.packing_ratios(length, window, rows, columns),
    }


def _memory(shape: Shape, lowering: str, device: str, tick: Tick) -> dict[str, Any]:
    gate = inputs(shape, device, torch.float32)[3].detach()
    peak = peak_bytes(masks.mask_memory(shape, gate)[lowering])
    return {"shape": str(shape), "lowering": lowering, "bytes": peak, "dense": shape.query_heads * shape.length**2}
