"""`doctor`: run calls of a model and report what keeps them from their compiled kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from flexdma import checks
from flexdma.tools.doctor.environment import this_environment
from flexdma.tools.doctor.findings import environment_findings, error_finding, findings_of, float64_finding
from flexdma.tools.doctor.report import PROBLEM, Diagnosis
from flexdma.tools.doctor.watch import Seen, watching
from flexdma.tools.model_calls import call_with_gradients, tensors_of

BACKENDS = ("inductor", "eager")
Call = Sequence[Any] | dict[str, Any]


def doctor(fn_or_module: Callable | nn.Module, *calls: Call, backend: str = "inductor") -> Diagnosis:
    """Run the calls and report graph breaks, recompilations, FlexAttention that runs uncompiled, float64 and versions.

    fn_or_module: the function or module to call.  It is compiled with torch.compile unless it already is.
    calls: for each call the tuple of its arguments, or a dict of keyword arguments.  Pass several that differ as yours do
        (lengths, numbers, masks), to find recompilations; a single call is made twice.
    backend: "inductor" compiles and runs the real kernels.  "eager" only captures graphs, in a second or two, and finds
        breaks and recompilations but no errors of code generation.

    Where an output requires a gradient the backward runs too, without changing any .grad.  A call that raises is a finding.
    Clears the compiled code of this process before and after.

        report = flexdma.doctor(model, (batch,), (shorter_batch,))
        print(report); assert report.ok

    Returns a Diagnosis.  Raises TypeError or ValueError naming the argument.
    """
    if not callable(fn_or_module):
        raise TypeError(f"fn_or_module: expected a function or an nn.Module, got {type(fn_or_module).__name__}")
    checks.one_of("backend", backend, BACKENDS)
    if not calls:
        raise ValueError("calls: expected at least one tuple of arguments, got none")
    for call in calls:
        if not isinstance(call, tuple | list | dict):
            raise TypeError(
                f"calls: expected tuples of arguments or dicts of keyword arguments, got {type(call).__name__}"
            )
    here = this_environment()
    found = []
    made = calls * 2 if len(calls) == 1 else calls
    with watching() as seen:
        compiled = fn_or_module if is_compiled(fn_or_module) else _compiled(fn_or_module, backend, seen)
        for number, call in enumerate(made, 1):
            try:
                args, kwargs = ((), call) if isinstance(call, dict) else (call, {})
                call_with_gradients(compiled, fn_or_module, args, kwargs)
            except Exception as error:  # an error of the user's code or of a compiler is a finding
                seen.collect()
                # Report the failed compilation once, as this error and not also as a skipped function.
                _, where = seen.skipped.pop() if seen.skipped else (None, None)
                found.append(error_finding(error, number, where))
                break
            seen.collect()
    found += findings_of(seen) + float64_finding(tensors_of(fn_or_module, calls)) + environment_findings(here)
    found.sort(key=lambda finding: finding.level != PROBLEM)
    return Diagnosis(here, backend, len(made), seen.graphs, len(seen.recompiled), found)


def is_compiled(fn_or_module: Callable) -> bool:
    """Whether it is a result of torch.compile."""
    return isinstance(fn_or_module, torch._dynamo.OptimizedModule) or hasattr(
        fn_or_module, "_torchdynamo_orig_callable"
    )


def _compiled(fn_or_module: Callable, backend: str, seen: Seen) -> Callable:
    if backend == "inductor":
        return torch.compile(fn_or_module)

    def run_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        # Mark that FlexAttention runs uncompiled here only because of this backend.
        def run(*arguments: Any) -> Any:
            seen.within_graph = True
            try:
                return graph(*arguments)
            finally:
                seen.within_graph = False

        return run

    return torch.compile(fn_or_module, backend=run_graph)
