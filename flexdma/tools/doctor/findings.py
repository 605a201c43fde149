"""Findings from the events of a run, each with its place and advice."""

import re
import textwrap
import traceback
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from flexdma.tools.doctor.advice import ERRORS, GRAPH_BREAKS, RECOMPILATIONS, advice
from flexdma.tools.doctor.environment import Environment, shortcomings
from flexdma.tools.doctor.report import NOTE, PROBLEM, Finding
from flexdma.tools.doctor.watch import Recompiled, Seen, place

SIZES = ("size mismatch", ".size()[")


def findings_of(seen: Seen) -> list[Finding]:
    """Graph breaks, functions left uncompiled, recompilations, limits, eager FlexAttention."""
    found = [
        Finding(PROBLEM, "graph break", _said(reason), where, advice(GRAPH_BREAKS, reason))
        for reason, where in dict.fromkeys(seen.breaks)
    ]
    found += [
        Finding(PROBLEM, "graph break", f"a function runs uncompiled: {_said(reason)}", where,
                advice(GRAPH_BREAKS, reason))
        for reason, where in dict.fromkeys(seen.skipped) if "recompile limit" not in reason
    ]  # fmt: skip
    found += _recompilations(seen.recompiled)
    found += [
        Finding(PROBLEM, "recompile limit", _line(message), _after("function:", message),
                "torch now runs this function uncompiled; remove the recompilations, or raise "
                "torch._dynamo.config.recompile_limit")
        for message in seen.limits
    ]  # fmt: skip
    found += [
        Finding(PROBLEM, "eager FlexAttention", "FlexAttention runs uncompiled and holds all Q x K scores", where,
                "call it inside torch.compile; if it already is, see the graph breaks and limits around it")
        for where in seen.eager_attention
    ]  # fmt: skip
    return found


def error_finding(error: Exception, call: int, where: str | None) -> Finding:
    """A call that raised.  where: the place of a failed compilation, or None."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    what = f"call {call} raised {type(error).__name__}: {_said(str(root)) or type(root).__name__}"
    where = where or place(list(traceback.extract_tb(root.__traceback__)))
    return Finding(PROBLEM, "error", what, where, advice(ERRORS, f"{error} {root}"))


def float64_finding(tensors: Iterable[Tensor]) -> list[Finding]:
    """A problem if all floating tensors are float64; a note if some are, because gates may be."""
    floating = [tensor.dtype == torch.float64 for tensor in tensors if tensor.is_floating_point()]
    if not any(floating):
        return []
    what = f"{sum(floating)} of {len(floating)} floating point tensors of the call are float64"
    if all(floating):
        do = "compiled FlexAttention does not support float64, and lowering=None uses gather: use float32 or bfloat16"
        return [Finding(PROBLEM, "float64", what, "arguments and parameters", do)]
    do = "nothing if only gates are float64; for float64 query, key and value lowering=None uses gather"
    return [Finding(NOTE, "float64", what, "arguments and parameters", do)]


def environment_findings(here: Environment) -> list[Finding]:
    """The shortcomings of the environment as findings."""
    return [Finding(PROBLEM if bad else NOTE, "environment", what, "", do) for bad, what, do in shortcomings(here)]


def _recompilations(recompiled: list[Recompiled]) -> list[Finding]:
    """One finding for each function and guard.  Guards that differ only in numbers are one."""
    alike: dict[tuple[str, str], list[Recompiled]] = {}
    times = Counter(one.frame for one in recompiled)
    for one in recompiled:
        alike.setdefault((one.where, re.sub(r"\d+", "0", _guard(one.guard))), []).append(one)
    found = []
    for (where, _), group in alike.items():
        guard = _guard(group[0].guard)
        # The second compilation is for any size: torch makes a size dynamic once it has changed.
        learns = times[group[0].frame] == 1 and any(word in guard for word in SIZES)
        often = f" {len(group)} times, at first" if len(group) > 1 else ""
        what = f"compiled again{often} because this no longer held: {guard}"
        do = "nothing: torch has made the size dynamic" if learns else advice(RECOMPILATIONS, group[0].guard)
        found.append(Finding(NOTE if learns else PROBLEM, "recompilation", what, where, do))
    return found


def _guard(reason: str) -> str:
    """`0/0: n == 1     # def f(x, n): ...` -> `n == 1`."""
    return _line(reason).partition(": ")[2].partition("  #")[0].strip() or _line(reason)


def _said(text: str) -> str:
    """The first line of torch's message, and its explanation if there is one."""
    explanation = next((line.partition("Explanation:")[2] for line in text.splitlines() if "Explanation:" in line), "")
    return _line(text) + (f": {textwrap.shorten(explanation, 240)}" if explanation else "")


def _line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _after(label: str, text: str) -> str:
    return next((line.partition(label)[2].strip() for line in text.splitlines() if label in line), "unknown")
