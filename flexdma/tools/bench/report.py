"""Results as the Markdown of docs/benchmarks.md: a function of what was measured, so that no figure is copied by hand."""

from typing import Any

from flexdma.tools.bench import tables
from flexdma.tools.bench.targets import targets


def markdown(results: dict[str, Any]) -> str:
    """The tables; where nothing is measured, {"suite": its name}, what must be reached."""
    reached = targets(results["suite"], results)
    if "machine" not in results:
        return "\n".join(reached) + "\n"
    about = ", ".join(f"{name} {value}" for name, value in results["machine"].items() if value is not None)
    lines = [
        f"Measured with {about}; {results['dtype']}, B=1, {results['heads']}, medians of up to {results['rounds']} "
        "interleaved runs.",
    ]
    lines += ["", *reached] if reached else []
    for section, table in tables.TABLES.items():
        if results.get(section):
            lines += ["", *table(results[section])]
    if results["failed"]:
        lines += ["", "Cases that failed:", "", *(f"- {case}: {why}" for case, why in results["failed"].items())]
    if results["skipped"]:
        lines += ["", "Cases skipped, as the time was spent:", "", *(f"- {case}" for case in results["skipped"])]
    return "\n".join(lines) + "\n"


def between(page: str, suite: str, text: str) -> str:
    """`page` with what stands between the marks of this suite replaced by `text`.

    The marks are the lines <!-- bench SUITE --> and <!-- end of bench SUITE -->.  Raises ValueError where they are not.
    """
    first, last = f"<!-- bench {suite} -->\n", f"<!-- end of bench {suite} -->"
    before, found, rest = page.partition(first)
    _, closed, after = rest.partition(last)
    if not found or not closed:
        raise ValueError(f"expected the lines {first.strip()!r} and {last!r}")
    return f"{before}{first}\n{text}\n{last}{after}"
