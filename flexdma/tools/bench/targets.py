"""The targets of a suite and the reached values, as a table."""

from collections.abc import Callable

from flexdma.tools.bench.decoding_tables import DECODING_TARGETS
from flexdma.tools.bench.gradients import DEFAULT, gradient_shares
from flexdma.tools.bench.suites import FORWARD, TRAINING
from flexdma.tools.bench.tables import share_of_selecting, table, useful_rate_over_flex
from flexdma.tools.records import Case, Results
from flexdma.tools.shapes import Shape
from flexdma.tools.whole_calls import COMPILED, fastest_causal

NOT_MEASURED = "not measured"


def targets(results: Results) -> list[str]:
    """The table in Markdown lines; empty for a suite without targets."""
    reached = TARGETS.get(results.about["suite"], {})
    rows = ([what, found(results) or NOT_MEASURED] for what, found in reached.items())
    return table(["target", "reached"], *rows) if reached else []


def _call(results: Results, shape: Shape) -> Case | None:
    return next((case for case in results.cases("calls") if case.title == str(shape)), None)


def _faster(shape: Shape, times: float, results: Results) -> str:
    case = _call(results, shape)
    base, ours = (fastest_causal(case.seconds), case.seconds.get(COMPILED)) if case else (None, None)
    return _judged(f"{base / ours:.1f}", base / ours >= times) if base and ours else ""


def _gate_gradient(results: Results) -> str:
    shares = next((gradient_shares(case.seconds) for case in results.cases("gate gradient")), {})
    found = ", ".join(f"{share:.1%} by {route}" for route, share in shares.items())
    enough = any(share <= 0.20 for route, share in shares.items() if route.endswith(DEFAULT))
    return _judged(found, enough) if found else ""


def _selecting(results: Results) -> str:
    shares = {case.shape.length: share_of_selecting(case) for case in results.cases("lengths")}
    found = {length: share for length, share in shares.items() if share is not None}
    listed = ", ".join(f"{share:.1%} at N={length}" for length, share in found.items())
    return _judged(listed, max(found.values()) <= 0.10) if found else ""


def _rate(results: Results) -> str:
    case = _call(results, FORWARD)
    ratio = useful_rate_over_flex(case) if case else None
    return _judged(f"{ratio:.2f}", ratio >= 0.5) if ratio is not None else ""


def _judged(found: str, enough: bool) -> str:
    return found if enough else f"**missed**: {found}"


TARGETS: dict[str, dict[str, Callable[[Results], str]]] = {
    "decode": DECODING_TARGETS,
    "gpu": {
        f"{FORWARD}: 5 times faster than the fastest causal SDPA (ideal 16)": lambda r: _faster(FORWARD, 5, r),
        f"{TRAINING}: 20 times (ideal 64)": lambda r: _faster(TRAINING, 20, r),
        "gate gradient, of the backward: at most 20 %": _gate_gradient,
        "ranking + lifespans, of the forward, N = 4k to 1M: at most 10 %": _selecting,
        "useful rate / that of FlexAttention causal in the same run: at least 0.5": _rate,
    },
}
