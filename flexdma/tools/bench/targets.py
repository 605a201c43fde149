"""The targets of a suite and the reached values, as a table."""

from collections.abc import Callable, Sequence
from functools import partial

from flexdma.tools.bench.decoding_tables import DECODING_TARGETS
from flexdma.tools.bench.gradients import DEFAULT, gradient_shares
from flexdma.tools.bench.mask_tables import MASK_TARGETS
from flexdma.tools.bench.suites import CPU_TARGETS, FORWARD, TRAINING
from flexdma.tools.bench.tables import share_of_selecting, table, useful_rate_over_flex
from flexdma.tools.records import Case, Results
from flexdma.tools.shapes import Shape
from flexdma.tools.whole_calls import COMPILED, COMPILED_DEFAULT, EAGER, fastest_causal

NOT_MEASURED = "not measured"


def targets(results: Results) -> list[str]:
    """The table in Markdown lines; empty for a suite without targets."""
    reached = TARGETS.get(results.about["suite"], {})
    rows = ([what, found(results) or NOT_MEASURED] for what, found in reached.items())
    return table(["target", "reached"], *rows) if reached else []


def _call(results: Results, shape: Shape) -> Case | None:
    return next((case for case in results.cases("calls") if case.title == str(shape)), None)


def _faster(shape: Shape, times: float, results: Results, contenders: Sequence[str] = (COMPILED,)) -> str:
    """By the first of the contenders; the others are listed beside it."""
    case = _call(results, shape)
    base = fastest_causal(case.seconds) if case else None
    if case is None or base is None:
        return ""
    found = {name: base / case.seconds[name] for name in contenders if name in case.seconds}
    listed = ", ".join(
        f"{ratio:.1f} ({name})" if len(contenders) > 1 else f"{ratio:.1f}" for name, ratio in found.items()
    )
    return _judged(listed, found[contenders[0]] >= times) if contenders[0] in found else ""


def _faster_on_cpu(shape: Shape, times: float, results: Results) -> str:
    return _faster(shape, times, results, (EAGER, COMPILED_DEFAULT, COMPILED))


def _compiled_is_not_slower(results: Results) -> str:
    """The compiled default call over the eager one, in all whole calls; 3 % are the noise of medians."""
    ratios = {
        case.title: case.seconds[EAGER] / case.seconds[COMPILED_DEFAULT]
        for case in results.cases("calls")
        if {EAGER, COMPILED_DEFAULT} <= case.seconds.keys()
    }
    listed = ", ".join(f"{ratio:.2f} at {title}" for title, ratio in ratios.items())
    return _judged(listed, min(ratios.values()) >= 0.97) if ratios else ""


def _memory_of_training(results: Results) -> str:
    """Peak memory of training calls beside inputs and results, over that of key and value (float32)."""
    found = {}
    for case in results.cases("calls"):
        peak = case.metric("peak_bytes").get(EAGER)
        if case.shape.backward and peak is not None:
            queries, keys = (
                heads * case.shape.length * case.shape.size * 4 for heads in (case.shape.query_heads, case.shape.heads)
            )
            # The output, its gradient, and those of query, key, value and gate.
            kept = 3 * queries + 2 * keys + keys / case.shape.size
            found[case.title] = (peak - kept) / (2 * keys)
    listed = ", ".join(f"{ratio:.1f} at {title}" for title, ratio in found.items())
    longest = max(found, default="", key=lambda title: results.shapes[title].length)
    return _judged(listed, found[longest] <= 1.5) if found else ""


def _gate_gradient(results: Results) -> str:
    shares = next((gradient_shares(case.seconds) for case in results.cases("gate gradient")), {})
    found = ", ".join(f"{share:.1%} by {route}" for route, share in shares.items())
    enough = any(share <= 0.20 for route, share in shares.items() if route.endswith(DEFAULT))
    return _judged(found, enough) if found else ""


def _selecting(most: float, results: Results) -> str:
    shares = {case.shape.length: share_of_selecting(case) for case in results.cases("lengths")}
    found = {length: share for length, share in shares.items() if share is not None}
    listed = ", ".join(f"{share:.1%} at N={length}" for length, share in found.items())
    return _judged(listed, max(found.values()) <= most) if found else ""


def _rate(results: Results) -> str:
    case = _call(results, FORWARD)
    ratio = useful_rate_over_flex(case) if case else None
    return _judged(f"{ratio:.2f}", ratio >= 0.5) if ratio is not None else ""


def _judged(found: str, enough: bool) -> str:
    return found if enough else f"**missed**: {found}"


TARGETS: dict[str, dict[str, Callable[[Results], str]]] = {
    "decode": DECODING_TARGETS,
    "masks": MASK_TARGETS,
    "cpu": {
        **{
            f"{shape}: {times} times faster than causal SDPA": partial(_faster_on_cpu, shape, times)
            for shape, times in CPU_TARGETS.items()
        },
        "the compiled call, over the eager one: at least 1": _compiled_is_not_slower,
        "peak memory of training beside inputs and results, N = 8192: at most 1.5 times key and value": _memory_of_training,
        "ranking + lifespans, of the forward, N = 4k to 1M: at most 5 %": partial(_selecting, 0.05),
    },
    "gpu": {
        f"{FORWARD}: 5 times faster than the fastest causal SDPA (ideal 16)": lambda r: _faster(FORWARD, 5, r),
        f"{TRAINING}: 20 times (ideal 64)": lambda r: _faster(TRAINING, 20, r),
        "gate gradient, of the backward: at most 20 %": _gate_gradient,
        "ranking + lifespans, of the forward, N = 4k to 1M: at most 10 %": partial(_selecting, 0.10),
        "useful rate / that of FlexAttention causal in the same run: at least 0.5": _rate,
    },
}
