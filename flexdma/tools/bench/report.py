"""Results as the Markdown of docs/benchmarks.md, so that nobody copies a figure by hand."""

from flexdma.tools.bench.tables import all_tables
from flexdma.tools.bench.targets import targets
from flexdma.tools.records import Results


def markdown(results: Results) -> str:
    """The tables; only the targets where nothing is measured."""
    about, reached = results.about, targets(results)
    if "machine" not in about:
        return "\n".join(reached) + "\n"
    where = ", ".join(f"{name} {value}" for name, value in about["machine"].items() if value is not None)
    sizes = f"{about.get('batch', 'B=1')}, {about['heads']}"
    lines = [f"Measured with {where}; {about['dtype']}, {sizes}, medians of up to {about['rounds']} interleaved runs."]
    lines += (["", *reached] if reached else []) + all_tables(results)
    failed = [f"- {case}: {why}" for case, why in results.whole_cases("failed")]
    skipped = [f"- {case}" for case, _ in results.whole_cases("skipped")]
    lines += ["", "Cases that failed:", "", *failed] if failed else []
    lines += ["", "Cases skipped, because the time was used up:", "", *skipped] if skipped else []
    return "\n".join(lines) + "\n"
