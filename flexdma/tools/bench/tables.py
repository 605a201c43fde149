"""One Markdown table per section of the results."""

from collections.abc import Callable, Iterable
from typing import Any

from flexdma.tools.bench.contenders import CAUSAL, COMPILED, FLEX_CAUSAL, TO_EVERYTHING
from flexdma.tools.bench.gradients import WITHOUT
from flexdma.tools.bench.stages import BEFORE_ATTENTION, SELECTION, WHOLE

MIB = 2**20
Entries = list[dict[str, Any]]


def table(*rows: Iterable[str]) -> list[str]:
    """In Markdown; the first row is the head."""
    head, *body = [list(row) for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def fastest_causal(seconds: dict[str, float]) -> float | None:
    """Seconds of causal SDPA by the fastest of the backends that were tried."""
    return min((s for name, s in seconds.items() if name.startswith(CAUSAL)), default=None)


def useful_rate_over_flex(case: dict[str, Any]) -> float | None:
    """The useful rate of flexdma's kernel over that of the same compiler's causal attention, where both were timed."""
    ours, causal = case["seconds"].get(COMPILED), case["seconds"].get(FLEX_CAUSAL)
    return (case["useful_flops"] / ours) / (case["causal_flops"] / causal) if ours and causal else None


def share_of_selecting(case: dict[str, Any]) -> float | None:
    """Ranking + lifespans, of the whole forward, where both were timed."""
    selection, whole = case["seconds"].get("selection"), case["seconds"].get("flexdma")
    return selection / whole if selection and whole else None


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
    return [*table(head, *rows), *(line for case in cases for line in _rate_against_flex(case))]


def _rate_against_flex(case: dict[str, Any]) -> list[str]:
    ratio = useful_rate_over_flex(case)
    if ratio is None:
        return []
    return ["", f"{case['shape']}: useful rate of {COMPILED} / that of {FLEX_CAUSAL} = {ratio:.2f}"]


def _others(cases: Entries) -> list[str]:
    return ["Beside other ways to the same or similar result:", "", *_calls(cases)]


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
    lines += table(["stage", "milliseconds", "of the whole", "useful GFLOP/s", "peak memory"], *rows)
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
    return [*lines, *table(head, *rows), *(line for case in cases for line in _failures(case))]


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
    return ["Launches:", "", *table(head, *rows), *(line for case in cases for line in _failures(case))]


def _lengths(cases: Entries) -> list[str]:
    rows = []
    for case in cases:
        share = share_of_selecting(case)
        selection = _milliseconds(case["seconds"].get("selection"))
        rows.append([f"{case['length']:,}", *_compared(case), selection, "" if share is None else f"{share:.1%}"])
    head = ["N", "flexdma, ms", "causal SDPA, ms", "faster", "useful GFLOP/s", "ranking + lifespans, ms", "of flexdma"]
    lines = [f"Forward against N, w={cases[0]['window']}:", "", *table(head, *rows)]
    return [*lines, *(line for case in cases for line in _failures(case))]


def _windows(cases: Entries) -> list[str]:
    rows = [[f"{case['window']:,}", *_compared(case)] for case in cases]
    head = ["w", "flexdma, ms", "causal SDPA, ms", "faster", "useful GFLOP/s"]
    lines = [f"Forward against w, N={cases[0]['length']}:", "", *table(head, *rows)]
    return [*lines, *(line for case in cases for line in _failures(case))]


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
        lines += table(["gates", "natural order", "packed"], *rows)
    return lines[1:]


def _memory(cases: Entries) -> list[str]:
    rows = [
        [case["shape"], case["lowering"], f"{case['bytes'] / MIB:.1f} MiB", f"{case['dense'] / MIB:.0f} MiB"]
        for case in cases
    ]
    head = ["", "lowering", "peak", "a Q x K mask of bytes"]
    return ["Peak memory of building masks and metadata:", "", *table(head, *rows)]


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.1f}"


def _mebibytes(number: int | None) -> str:
    return "" if number is None else f"{number / MIB:,.1f} MiB"


def _failures(case: dict[str, Any]) -> list[str]:
    why = [f"- {case['shape']}, {name}: {why}" for name, why in case["failed"].items()]
    return ["", *why] if why else []


TABLES: dict[str, Callable[[Entries], list[str]]] = {
    "calls": _calls,
    "others": _others,
    "stages": _stages,
    "gate_gradient": _gate_gradient,
    "launches": _launches,
    "lengths": _lengths,
    "windows": _windows,
    "packing": _packing,
    "memory": _memory,
}
