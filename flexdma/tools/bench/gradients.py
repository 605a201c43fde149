"""The gate gradient's share of the backward, by each route there is.

The backward alone is timed, on a forward that has just been made; the share is what it takes more than with a gate that
needs no gradient.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor

from flexdma import dynamic_mask_attention
from flexdma.lowerings import gate_gradient
from flexdma.tools.bench.contenders import Compile
from flexdma.tools.bench.limits import Budget
from flexdma.tools.bench.shapes import Shape
from flexdma.tools.bench.timing import Prepared, backward_of, interleaved

WITHOUT, DEFAULT = "no gate gradient", " (default)"
Route = Callable[[], AbstractContextManager]


def routes() -> dict[str, Route]:
    """Name -> a context in which the gate's gradient takes that route; the one that is taken by default says so."""
    default = gate_gradient.chosen_route(True, False)
    return {
        name + DEFAULT if name == default else name: partial(gate_gradient.gate_gradient_route, name)
        for name in gate_gradient.ROUTES
    }


def gate_gradient_share(
    shape: Shape,
    tensors: list[Tensor],
    lowering: str,
    rounds: int,
    tick: Callable[[str], None],
    budget: Budget | None,
    compiler: Compile,
) -> dict[str, Any]:
    """{"seconds": {route: of the whole backward}, "share": {route: of the gate's gradient in it}, ...}."""
    query, key, value, gate = tensors

    def backward(gate: Tensor, route: Route) -> Prepared:
        compiled = compiler(dynamic_mask_attention)  # of its own: the route is chosen when a call is traced

        def prepare() -> Tensor:
            with route():
                return compiled(query, key, value, gate, window_size=shape.window, lowering=lowering)

        def run(output: Tensor) -> None:
            with route():
                backward_of(output, (query, key, value, gate))

        return Prepared(prepare, run)

    calls = {WITHOUT: backward(gate.detach(), nullcontext)}
    calls |= {name: backward(gate, route) for name, route in routes().items()}
    measured = interleaved(calls, rounds, tick, budget)
    base = measured.seconds.get(WITHOUT)
    share = {name: 1 - base / s for name, s in measured.seconds.items() if base is not None and name != WITHOUT}
    return {"shape": str(shape), "lowering": lowering, "share": share, **vars(measured)}
