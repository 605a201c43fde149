"""One Markdown table per section of the results."""

from collections.abc import Callable, Iterable
from typing import Any

from flexdma.bench.contenders import CAUSAL, COMPILED, FLEX_CAUSAL, TO_EVERYTHING
from flexdma.bench.gradients import WITHOUT
from flexdma.bench.stages import BEFORE_ATTENTION, SELECTION, WHOLE

MIB = 2**20
Entries = list[dict[str, Any]]


def _table(*rows: Iterable[str]) -> list[str]:
    """The first row is the head."""
    head, *body = [list(row) for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def fastest_causal(seconds: dict[str, float]) -> float | None:
    """Seconds of causal SDPA by the fastest of the backends that were tried."""
    return min((s for name, s in seconds.items() if name.startswith(CAUSAL)), default=None)


def _calls(cases: Entries) -> list[str]:
    rows = []
    for case in cases:
        base = fastest_causal(case["seconds"])
        for name, seconds in case["seconds"].items():
            everything = name.startswith(TO_EVERYTHING)
            flops = case["causal_flops" if everything else "useful_flops"]
            ratio = case["visited_over_ideal"].get(CAUSAL if everything else name)
            rows.append(
                [
                    case["shape"], name, f"{seconds:.4f}", "" if base is None else f"{base / seconds:.2f} x",
                    f"{flops / seconds / 1e9:,.0f}", "" if ratio is None else f"{ratio:.2f}",
                    _mebibytes(case["peak_bytes"].get(name)),
                ]
            )  # fmt: skip
        rows += [[case["shape"], name, why, "", "", "", ""] for name, why in case["failed"].items()]
    head = ["", "", "seconds", "faster than causal SDPA", "useful GFLOP/s", "visited / ideal", "peak memory"]
    return [*_table(head, *rows), *(line for case in cases for line in _rate_against_flex(case))]


def _rate_against_flex(case: dict[str, Any]) -> list[str]:
    """The useful rate of flexdma's kernel over that of the same compiler's causal attention, where both were timed."""
    ours, causal = case["seconds"].get(COMPILED), case["seconds"].get(FLEX_CAUSAL)
    if not ours or not causal:
        return []
    ratio = (case["useful_flops"] / ours) / (case["causal_flops"] / causal)
    return ["", f"{case['shape']}: useful rate of {COMPILED} / that of {FLEX_CAUSAL} = {ratio:.2f}"]


def _stages(profiles: Entries) -> list[str]:
    return [line for profile in profiles for line in ("", *_one_profile(profile))][1:]


def _one_profile(profile: dict[str, Any]) -> list[str]:
    whole, stages, peaks = profile["whole"], profile["seconds"], profile["peak_bytes"]
    lines = [f"Stages of {profile['lowering']}, {profile['shape']}, the gate's projection included:", ""]

    def row(name: str, seconds: float, of: float | None) -> list[str]:
        flops = profile["useful_flops"].get(name)
        rate = f"{flops / seconds / 1e9:,.0f}" if flops and seconds > 0 else ""
        share = "" if of is None else f"{seconds / of:.1%}"
        return [name, f"{seconds * 1e3:.2f}", share, rate, _mebibytes(peaks.get(name))]

    rows = [row(name, seconds, whole) for name, seconds in stages.items()]
    total = sum(stages.values())
    rows.append(row("sum of the stages", total, whole))
    if whole is not None:
        rows += [row(WHOLE, whole, whole), row("whole - sum", whole - total, whole)]
        rows += [
            row(f"*{name}*", sum(stages.get(part, 0.0) for part in parts), whole)
            for name, parts in (
                ("ranking + lifespans", SELECTION),
                ("all before attention", BEFORE_ATTENTION[profile["lowering"]]),
            )
        ]
    lines += _table(["stage", "milliseconds", "of the whole", "useful GFLOP/s", "peak memory"], *rows)
    return lines + _failures(profile)


def _gate_gradient(cases: Entries) -> list[str]:
    lines = ["Gate gradient, by route, of the backward:", ""]
    rows = []
    for case in cases:
        for name, seconds in case["seconds"].items():
            share = "" if name == WITHOUT else f"{case['share'].get(name, float('nan')):.1%}"
            peak = _mebibytes(case["peak_bytes"].get(name))
            rows.append([f"{case['lowering']}, {case['shape']}", name, f"{seconds * 1e3:.2f}", share, peak])
    head = ["", "route", "backward, milliseconds", "gate gradient's share", "peak memory"]
    return [*lines, *_table(head, *rows), *(line for case in cases for line in _failures(case))]


def _launches(cases: Entries) -> list[str]:
    rows = []
    for case in cases:
        for name, work in case["device_work"].items():
            seconds = case["seconds"][name]
            rows.append(
                [
                    case["shape"], name, f"{seconds * 1e3:.2f}", f"{work['launches']:.0f}", f"{work['kernels']:.0f}",
                    f"{work['device_seconds'] * 1e3:.2f}", f"{work['attention_seconds'] * 1e3:.2f}",
                ]
            )  # fmt: skip
    head = ["", "", "milliseconds", "launches by the host", "kernels run", "device busy, ms", "in attention, ms"]
    return ["Launches:", "", *_table(head, *rows), *(line for case in cases for line in _failures(case))]


def _lengths(cases: Entries) -> list[str]:
    rows = []
    for case in cases:
        seconds = case["seconds"]
        selection, whole = seconds.get("selection"), seconds.get("flexdma")
        share = f"{selection / whole:.1%}" if selection and whole else ""
        rows.append([f"{case['length']:,}", *_compared(case), _milliseconds(selection), share])
    head = ["N", "flexdma, ms", "causal SDPA, ms", "faster", "useful GFLOP/s", "ranking + lifespans, ms", "of flexdma"]
    return [f"Forward against N, w={cases[0]['window']}:", "", *_table(head, *rows)]


def _windows(cases: Entries) -> list[str]:
    rows = [[f"{case['window']:,}", *_compared(case)] for case in cases]
    head = ["w", "flexdma, ms", "causal SDPA, ms", "faster", "useful GFLOP/s"]
    return [f"Forward against w, N={cases[0]['length']}:", "", *_table(head, *rows)]


def _compared(case: dict[str, Any]) -> list[str]:
    """Of one length or window: time, time of causal SDPA, their ratio, the useful rate."""
    ours, causal = case["seconds"].get("flexdma"), fastest_causal(case["seconds"])
    return [
        _milliseconds(ours) or case["failed"].get("flexdma", ""), _milliseconds(causal),
        f"{causal / ours:.2f} x" if ours and causal else "",
        f"{case['useful_flops'] / ours / 1e9:,.0f}" if ours else "",
    ]  # fmt: skip


def _packing(cases: Entries) -> list[str]:
    lines = []
    for case in cases:
        ratios = case["ratios"]
        means = [sum(ratio[n] for ratio in ratios.values()) / len(ratios) for n in (0, 1)]
        rows = [[name, f"{natural:.2f}", f"{packed:.2f}"] for name, (natural, packed) in ratios.items()]
        rows.append(["**mean**", f"{means[0]:.2f}", f"**{means[1]:.2f}**"])
        lines += ["", f"Visited blocks / ideal, N={case['length']} w={case['window']}, {case['tile']}:", ""]
        lines += _table(["gates", "natural order", "packed"], *rows)
    return lines[1:]


def _memory(cases: Entries) -> list[str]:
    rows = [
        [case["shape"], case["lowering"], f"{case['bytes'] / MIB:.1f} MiB", f"{case['dense'] / MIB:.0f} MiB"]
        for case in cases
    ]
    head = ["", "lowering", "peak", "a Q x K mask of bytes"]
    return ["Peak memory of building masks and metadata:", "", *_table(head, *rows)]


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"


def _mebibytes(number: int | None) -> str:
    return "" if number is None else f"{number / MIB:,.1f} MiB"


def _failures(case: dict[str, Any]) -> list[str]:
    return ["", *(f"- {name}: {why}" for name, why in case["failed"].items())] if case["failed"] else []


TABLES: dict[str, Callable[[Entries], list[str]]] = {
    "calls": _calls,
    "stages": _stages,
    "gate_gradient": _gate_gradient,
    "launches": _launches,
    "lengths": _lengths,
    "windows": _windows,
    "packing": _packing,
    "memory": _memory,
}
