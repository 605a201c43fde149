"""The gate gradient's share of the backward, by route.

Only the backward is timed, after a new forward each time.  The share is its extra time over a backward whose gate needs no
gradient.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import Tensor

from flexdma import dynamic_mask_attention
from flexdma.lowerings import gate_gradient
from flexdma.tools.shapes import Shape
from flexdma.tools.timing import Measured, Prepared, Turns, backward_of, interleaved
from flexdma.tools.whole_calls import Compile

WITHOUT, DEFAULT = "no gate gradient", " (default)"
Route = Callable[[], AbstractContextManager]


def routes() -> dict[str, Route]:
    """Name -> a context in which that route computes the gate's gradient; the name of the default ends in DEFAULT."""
    default = gate_gradient.chosen_route(True, False)
    return {
        name + DEFAULT if name == default else name: partial(gate_gradient.gate_gradient_route, name)
        for name in gate_gradient.ROUTES
    }


def gate_gradient_routes(
    shape: Shape, tensors: list[Tensor], lowering: str, turns: Turns, compiler: Compile
) -> Measured:
    """Time and memory of the whole backward, WITHOUT the gate's gradient and by each route."""
    query, key, value, gate = tensors

    def backward(gate: Tensor, route: Route) -> Prepared:
        compiled = compiler(dynamic_mask_attention)  # one for each route, because tracing chooses the route

        def prepare() -> Tensor:
            with route():
                return compiled(query, key, value, gate, window_size=shape.window, lowering=lowering)

        def run(output: Tensor) -> None:
            with route():
                backward_of(output, (query, key, value, gate))

        return Prepared(prepare, run)

    calls = {WITHOUT: backward(gate.detach(), nullcontext)}
    return interleaved(calls | {name: backward(gate, route) for name, route in routes().items()}, turns)


def gradient_shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Route -> the gate gradient's share of the backward; empty unless the backward without it was timed."""
    base = seconds.get(WITHOUT)
    return {} if base is None else {name: 1 - base / s for name, s in seconds.items() if name != WITHOUT}
