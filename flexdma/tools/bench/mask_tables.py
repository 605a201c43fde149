"""The tables and targets of the suite "masks"."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from flexdma.tools.bench.mask_contenders import (
    ALONE,
    CREATED,
    CREATED_COMPILED,
    DEFAULT,
    FLEX,
    MASK_SIZES,
    OWN_ORDER,
)
from flexdma.tools.bench.mask_sections import BUILDING, CALLS
from flexdma.tools.bench.visited import VISITED
from flexdma.tools.records import Case, Results

MIB = 2**20
# FlexAttention with its own BlockMask.
OWN_BLOCK_MASK = (CREATED, CREATED_COMPILED)
# What makes a mask of lifespans.
MADE_HERE = {OWN_ORDER: "lifespan_block_mask", FLEX: "places and blocks of lifespan_attention"}
SCATTERS = "random eviction, cache of N / 16"
COLUMNS = {
    ALONE: "mask_mod alone", CREATED: "create_block_mask", CREATED_COMPILED: "compiled create_block_mask",
    OWN_ORDER: "lifespan_block_mask", FLEX: "flex", DEFAULT: "default",
}  # fmt: skip


def times_faster(seconds: Mapping[str, float], ours: str) -> float | None:
    """FlexAttention with its own BlockMask, the faster way to make it, over ours; None unless both were timed."""
    theirs = [seconds[name] for name in OWN_BLOCK_MASK if name in seconds]
    return min(theirs) / seconds[ours] if theirs and ours in seconds else None


def call_rows(cases: list[Case]) -> list[list[str]]:
    """A row for each family: milliseconds by contender, how many times faster, and visited blocks over the ideal."""
    names = [name for name in COLUMNS if any(name in case.rows for case in cases)]
    ours = [name for name in (FLEX, DEFAULT) if name in names]
    rows = [
        [
            "mask",
            *(f"{COLUMNS[name]}, ms" for name in names),
            *(f"{COLUMNS[name]}, times faster" for name in ours),
            "visited / ideal in order",
            "visited / ideal of flex",
        ]
    ]
    for case in cases:
        visited = case.metric(VISITED)
        rows.append(
            [case.title, *(_milliseconds(case, name) for name in names)]
            + [_shown(times_faster(case.seconds, name)) for name in ours]
            + [_shown(visited.get(name)) for name in (OWN_ORDER, FLEX)]
        )
    return rows


def building_rows(cases: list[Case]) -> list[list[str]]:
    """A row for each family and way to make its mask."""
    than = [f"times faster than {COLUMNS[name]}" for name in OWN_BLOCK_MASK]
    rows = [["mask", "made by", "ms", "peak memory, MiB", *than]]
    for case in cases:
        peaks = case.metric("peak_bytes")
        for name in (*OWN_BLOCK_MASK, *MADE_HERE):
            faster = [built_faster(case, name, other) if name in MADE_HERE else None for other in OWN_BLOCK_MASK]
            peak = f"{peaks[name] / MIB:,.1f}" if name in peaks else ""
            made_by = MADE_HERE.get(name, COLUMNS[name])
            rows.append([case.title, made_by, _milliseconds(case, name), peak, *map(_shown, faster)])
    return rows


def built_faster(case: Case, ours: str, other: str) -> float | None:
    """The seconds of another way to make the mask over ours; None unless both were timed."""
    seconds = case.seconds
    return seconds[other] / seconds[ours] if ours in seconds and other in seconds else None


def failures(cases: Iterable[Case]) -> list[str]:
    """A line for each contender that failed."""
    return [f"- {case.title}, {name}: {why}" for case in cases for name, why in case.metric("failed").items()]


def _milliseconds(case: Case, name: str) -> str:
    seconds = case.seconds.get(name)
    return "" if seconds is None else f"{seconds * 1e3:,.1f}"


def _shown(number: float | None) -> str:
    return "" if number is None else f"{number:.2f}"


def _judged(found: Mapping[str, float], enough: float) -> str:
    if not found:
        return ""
    worst = min(found, key=lambda where: found[where])
    text = f"{found[worst]:.2f} ({worst})"
    return text if found[worst] >= enough else f"**missed**: {text}"


def _never_slower(results: Results) -> str:
    ours = FLEX if results.about["device"] == "cuda" else DEFAULT
    ratios = {case.title: times_faster(case.seconds, ours) for case in results.cases(CALLS)}
    return _judged({title: ratio for title, ratio in ratios.items() if ratio is not None}, 0.95)


def _scattered(ours: str, results: Results) -> str:
    cases = [case for case in results.cases(CALLS) if case.title == SCATTERS]
    found = {f"{case.title}, {COLUMNS[ours]}": times_faster(case.seconds, ours) for case in cases}
    return _judged({where: ratio for where, ratio in found.items() if ratio is not None}, 3)


def _building(other: str, results: Results) -> str:
    found = {
        f"{made_by}, {case.title}": built_faster(case, name, other)
        for case in results.cases(BUILDING)
        for name, made_by in MADE_HERE.items()
    }
    return _judged({where: ratio for where, ratio in found.items() if ratio is not None}, 20)


def _memory(results: Results) -> str:
    """Bits of a Q x K mask over the peak of making ours."""
    bits = MASK_SIZES[results.about["device"]].building ** 2 / 8
    found = {
        f"{made_by}, {case.title}": bits / case.metric("peak_bytes")[name]
        for case in results.cases(BUILDING)
        for name, made_by in MADE_HERE.items()
        if name in case.metric("peak_bytes")
    }
    return _judged(found, 1)


MASK_TARGETS: dict[str, Callable[[Results], str]] = {
    "the default, over FlexAttention with its own BlockMask: at least 0.95 times as fast": _never_slower,
    f"{SCATTERS}: 3 times faster, by flex": partial(_scattered, FLEX),
    f"{SCATTERS}: 3 times faster, by the default on a CPU": partial(_scattered, DEFAULT),
    "making the mask: 20 times faster than create_block_mask": partial(_building, CREATED),
    "making the mask: 20 times faster than compiled create_block_mask": partial(_building, CREATED_COMPILED),
    "bits of a Q x K mask, over the peak memory of making ours: at least 1": _memory,
}
