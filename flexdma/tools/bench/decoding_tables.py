"""The tables and targets of the suite "decode"."""

from collections.abc import Callable, Iterator

from flexdma.tools.bench.decoding import GROWING, OURS, STATIC, contender
from flexdma.tools.records import Case, Results

# From this context on a token must not take longer than with a full cache.
FROM = 512
HEADS = {
    "decode layers": "One token, one layer (update of the cache and attention; flexdma's gate included):",
    "decode models": "One token, whole model:",
    "prefill": "Prefill of a whole model:",
}


def contexts(case: Case) -> list[int]:
    """The contexts of a case, in order of measurement."""
    return list(dict.fromkeys(int(name.split(":")[0].removeprefix("N=")) for name in case.rows))


def decoding_rows(cases: list[Case]) -> list[list[str]]:
    """Rows of a table: milliseconds at each context by each contender, and how many times faster flexdma is."""
    names = [name for name in (GROWING, STATIC) if any(name in row for case in cases for row in case.rows)]
    faster = [f"faster than {name}" for name in names]
    rows = [["", "N", *(f"{name}, ms" for name in (*names, OURS)), *faster]]
    for case in cases:
        for context in contexts(case):
            shown = [_milliseconds(case, contender(context, name)) for name in (*names, OURS)]
            ratios = [ratio(case, context, name) for name in names]
            rows.append([case.title, f"{context:,}", *shown, *("" if r is None else f"{r:.2f} x" for r in ratios)])
    return rows


def ratio(case: Case, context: int, name: str) -> float | None:
    """The seconds of a full cache over flexdma's; None unless both were timed."""
    full, ours = (case.seconds.get(contender(context, each)) for each in (name, OURS))
    return full / ours if full and ours else None


def _milliseconds(case: Case, name: str) -> str:
    seconds = case.seconds.get(name)
    return case.metric("failed").get(name, "") if seconds is None else f"{seconds * 1e3:.3f}"


def _ratios(results: Results, section: str, least: int, calibrated: bool) -> Iterator[tuple[str, float]]:
    for case in results.cases(section):
        if ("calibrated" in case.title) != calibrated:
            continue
        for context in contexts(case):
            found = [r for name in (GROWING, STATIC) if (r := ratio(case, context, name)) is not None]
            if found and context >= least:
                yield f"{case.title}, N={context}", min(found)


def _at_least(
    section: str, times: float, least: int, most: int | None = None, *, calibrated: bool = False
) -> Callable[[Results], str]:
    def reached(results: Results) -> str:
        found = {
            where: value
            for where, value in _ratios(results, section, least, calibrated)
            if most is None or int(where.rpartition("=")[2]) <= most
        }
        if not found:
            return ""
        worst = min(found, key=lambda where: found[where])
        text = f"{found[worst]:.2f} at least ({worst})"
        return text if found[worst] >= times else f"**missed**: {text}"

    return reached


DECODING_TARGETS: dict[str, Callable[[Results], str]] = {
    f"a token of a model, N >= {FROM}: at most the time of the faster full cache": _at_least("decode models", 1, FROM),
    "a token of a model, N = 16384: 2 times faster": _at_least("decode models", 2, 16384, 16384),
    "a token of a calibrated model, N = 4096: at most the time of the faster full cache": _at_least(
        "decode models", 1, 4096, 4096, calibrated=True
    ),
    "a token of a calibrated model, N = 16384: 2 times faster": _at_least(
        "decode models", 2, 16384, 16384, calibrated=True
    ),
    f"a token of a layer, N >= {FROM}: at most the time of the faster full cache": _at_least("decode layers", 1, FROM),
    "prefill of a model, N >= 1024: at most the time of the original": _at_least("prefill", 1, 1024),
}
