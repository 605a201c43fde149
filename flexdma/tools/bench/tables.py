"""One Markdown table per section of the results, as pivots of its records."""

from collections.abc import Callable, Iterable
from functools import partial

from flexdma.tools.bench.contenders import FLEX_CAUSAL, TO_EVERYTHING
from flexdma.tools.bench.decoding_tables import HEADS, decoding_rows
from flexdma.tools.bench.gradients import gradient_shares
from flexdma.tools.bench.mask_sections import BUILDING, CALLS
from flexdma.tools.bench.mask_tables import building_rows, call_rows, failures
from flexdma.tools.bench.sections import FLEXDMA, SELECTION
from flexdma.tools.bench.visited import VISITED
from flexdma.tools.records import Case, Results
from flexdma.tools.stages import BACKWARD, BEFORE_ATTENTION, FORWARD, RANKING_AND_LIFESPANS, WHOLE
from flexdma.tools.whole_calls import CAUSAL, COMPILED, fastest_causal

MIB = 2**20
Cases = list[Case]


def table(*rows: Iterable[str]) -> list[str]:
    """The rows as a Markdown table; the first is the head."""
    head, *body = [list(row) for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def all_tables(results: Results) -> list[str]:
    """The tables of all sections with results, each after an empty line."""
    return [
        line for section, lines in TABLES.items() if (cases := results.cases(section)) for line in ("", *lines(cases))
    ]


def useful_rate_over_flex(case: Case) -> float | None:
    """The useful rate of flexdma's flex lowering over that of causal FlexAttention; None unless both were timed."""
    ours, causal = case.seconds.get(COMPILED), case.seconds.get(FLEX_CAUSAL)
    return (
        (case.shape.useful_flops() / ours) / (case.shape.useful_flops("causal") / causal) if ours and causal else None
    )


def share_of_selecting(case: Case) -> float | None:
    """The time of ranking + lifespans over that of the forward; None unless both were timed."""
    selection, whole = case.seconds.get(SELECTION), case.seconds.get(FLEXDMA)
    return selection / whole if selection and whole else None


def _calls(cases: Cases) -> list[str]:
    rows = [["", "", "seconds", "faster than causal SDPA", "useful GFLOP/s", "visited / ideal", "peak memory"]]
    for case in cases:
        base, visited = fastest_causal(case.seconds), case.metric(VISITED)
        for name, seconds in case.seconds.items():
            everything = name.startswith(TO_EVERYTHING)
            rate = case.shape.useful_flops("causal" if everything else "selected") / seconds / 1e9
            ratio = visited.get(CAUSAL if everything else name)
            faster, peak = _shown(base and base / seconds, ".2f", " x"), _memory_of(case, name)
            rows.append([case.title, name, f"{seconds:.4f}", faster, f"{rate:,.0f}", _shown(ratio, ".2f"), peak])
        rows += [[case.title, name, why, "", "", "", ""] for name, why in case.metric("failed").items()]
    lines = table(*rows)
    for case in cases:
        if (rate_over_flex := useful_rate_over_flex(case)) is not None:
            lines += ["", f"{case.title}: useful rate of {COMPILED} / that of {FLEX_CAUSAL} = {rate_over_flex:.2f}"]
    return lines


def _others(cases: Cases) -> list[str]:
    return ["Compared with other methods of the same or a similar result:", "", *_calls(cases)]


def _stages(cases: Cases) -> list[str]:
    return [line for case in cases for line in ("", *_one_profile(case))][1:]


def _one_profile(case: Case) -> list[str]:
    lowering, stages = case.section.removeprefix("stages of "), case.seconds
    whole, forward = stages.pop(WHOLE, None), case.shape.forward().useful_flops()
    useful = {FORWARD: forward, BACKWARD: case.shape.useful_flops() - forward}

    def row(name: str, seconds: float) -> list[str]:
        rate = useful[name] / seconds / 1e9 if useful.get(name) and seconds > 0 else None
        share = _shown(whole and seconds / whole, ".1%")
        return [name, f"{seconds * 1e3:.2f}", share, _shown(rate, ",.0f"), _memory_of(case, name)]

    def together(parts: Iterable[str]) -> float:
        return sum(stages.get(part, 0.0) for part in parts)

    if not stages and whole is None:
        return [f"Stages of {lowering}, {case.title}: none measured", *_failures([case])]
    total = together(stages)
    rows = [*stages.items(), ("sum of the stages", total)]
    if whole is not None:
        rows += [(WHOLE, whole), ("whole - sum", whole - total)]
        rows += [("*ranking + lifespans*", together(RANKING_AND_LIFESPANS))]
        rows += [("*all before attention*", together(BEFORE_ATTENTION[lowering]))]
    head = ["stage", "milliseconds", "of the whole", "useful GFLOP/s", "peak memory"]
    lines = [f"Stages of {lowering}, {case.title}, the gate's projection included:", ""]
    return lines + table(head, *(row(*of) for of in rows)) + _failures([case])


def _gate_gradient(cases: Cases) -> list[str]:
    rows = [["", "route", "backward, milliseconds", "gate gradient's share", "peak memory"]]
    for case in cases:
        shares, where = gradient_shares(case.seconds), f"{case.section.removeprefix('gate gradient of ')}, {case.title}"
        for name, seconds in case.seconds.items():
            share = _shown(shares.get(name), ".1%")
            rows.append([where, name, f"{seconds * 1e3:.2f}", share, _memory_of(case, name)])
    return ["Gate gradient, by route, of the backward:", "", *table(*rows), *_failures(cases)]


def _launches(cases: Cases) -> list[str]:
    rows = [["", "", "milliseconds", "launches by the host", "kernels run", "device busy, ms", "in attention, ms"]]
    for case in cases:
        for name, found in case.rows.items():
            if "launches" in found:
                times = [f"{found[metric] * 1e3:.2f}" for metric in ("seconds", "device_seconds", "attention_seconds")]
                rows.append(
                    [case.title, name, times[0], f"{found['launches']:.0f}", f"{found['kernels']:.0f}", *times[1:]]
                )
    return ["Launches:", "", *table(*rows), *_failures(cases)]


def _sizes(letter: str, varies: str, constant: str, cases: Cases) -> list[str]:
    """Time against N or w, and where it was measured the share of the selection."""
    selects = any(SELECTION in case.rows for case in cases)
    head = [letter, "flexdma, ms", "causal SDPA by flash, ms", "faster", "useful GFLOP/s"]
    rows = [head + ["ranking + lifespans, ms", "of flexdma"] * selects]
    for case in cases:
        ours, causal, selection = case.seconds.get(FLEXDMA), fastest_causal(case.seconds), case.seconds.get(SELECTION)
        row = [f"{getattr(case.shape, varies):,}", _milliseconds(ours) or case.metric("failed").get(FLEXDMA, "")]
        row += [_milliseconds(causal), _shown(ours and causal and causal / ours, ".2f", " x")]
        row += [_shown(ours and case.shape.useful_flops() / ours / 1e9, ",.0f")]
        rows.append(row + [_milliseconds(selection), _shown(share_of_selecting(case), ".1%")] * selects)
    fixed = f"{'w' if letter == 'N' else 'N'}={getattr(cases[0].shape, constant)}"
    return [f"Forward against {letter}, {fixed}:", "", *table(*rows), *_failures(cases)]


def _packing(cases: Cases) -> list[str]:
    lines = []
    for case in cases:
        orders = [case.metric(order) for order in ("natural order", "packed")]
        rows = [[family, *(f"{order[family]:.2f}" for order in orders)] for family in case.rows]
        natural, packed = (f"{sum(order.values()) / len(order):.2f}" for order in orders)
        rows.append(["**mean**", natural, f"**{packed}**"])
        lines += ["", f"Visited blocks / ideal, {case.title}:", "", *table(["gates", "natural order", "packed"], *rows)]
    return lines[1:]


def _memory(cases: Cases) -> list[str]:
    rows = [["", "lowering", "peak", "a Q x K mask of bytes"]]
    for case in cases:
        dense = f"{case.shape.query_heads * case.shape.length**2 / MIB:.0f} MiB"
        rows += [[case.title, lowering, _memory_of(case, lowering), dense] for lowering in case.rows]
    return ["Peak memory of building masks and metadata:", "", *table(*rows)]


def _decoding(section: str, cases: Cases) -> list[str]:
    return [HEADS[section], "", *table(*decoding_rows(cases))]


def _masks(cases: Cases) -> list[str]:
    head = "Families of masks, forward, the mask made inside the timer; times faster than the faster create_block_mask:"
    why = failures(cases)
    return [head, "", *table(*call_rows(cases)), *(["", *why] if why else [])]


def _mask_building(cases: Cases) -> list[str]:
    why = failures(cases)
    return [
        "Making the mask alone, N=32768, one head:",
        "",
        *table(*building_rows(cases)),
        *(["", *why] if why else []),
    ]


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"


def _milliseconds(seconds: float | None) -> str:
    return _shown(seconds and seconds * 1e3, ".1f")


def _memory_of(case: Case, contender: str) -> str:
    peak = case.metric("peak_bytes").get(contender)
    return _shown(None if peak is None else peak / MIB, ",.1f", " MiB")


def _failures(cases: Cases) -> list[str]:
    why = [f"- {case.title}, {name}: {why}" for case in cases for name, why in case.metric("failed").items()]
    return ["", *why] if why else []


TABLES: dict[str, Callable[[Cases], list[str]]] = {
    "calls": _calls,
    "others": _others,
    "stages": _stages,
    "gate gradient": _gate_gradient,
    "launches": _launches,
    "lengths": partial(_sizes, "N", "length", "window"),
    "windows": partial(_sizes, "w", "window", "length"),
    "packing": _packing,
    "memory": _memory,
    **{section: partial(_decoding, section) for section in HEADS},
    CALLS: _masks,
    BUILDING: _mask_building,
}
