"""Masks without attention: how well packing fills the blocks, and the memory that building masks and metadata takes."""

from collections.abc import Callable

from torch import Tensor

from flexdma import causal_top_w
from flexdma.lowerings import flex
from flexdma.lowerings.fused import block_size_for
from flexdma.lowerings.living_keys import living_lists
from flexdma.packing.block_index import block_index
from flexdma.packing.schedule import schedule
from flexdma.tools.bench.shapes import Shape
from flexdma.tools.gate_families import gate_families


def packing_ratios(length: int, window: int, rows: int, columns: int) -> dict[str, tuple[float, float]]:
    """Family -> visited blocks over the ideal N w, in natural order and packed; tiles of rows positions by columns keys."""
    ratios = {}
    for name, gate in gate_families(length).items():
        lifespans = causal_top_w(gate[None, None], window)
        visible = (lifespans.death - lifespans.birth).sum().item()
        in_order = block_index(*lifespans, queries=length, block_size=(rows, columns))
        _, packed = schedule(
            lifespans, queries=length, group=1, capacity=window, block_size=(rows, columns), transposed=False
        )
        natural, dense = (c.visited().sum().item() * rows * columns / visible for c in (in_order, packed))
        ratios[name] = (natural, dense)
    return ratios


def mask_memory(shape: Shape, gate: Tensor) -> dict[str, Callable[[], object]]:
    """What builds masks and metadata, to be measured for peak memory."""
    group = shape.query_heads // shape.heads
    block_size = flex.default_block_size(gate.device.type)

    def flexed() -> object:
        return schedule(
            causal_top_w(gate, shape.window),
            queries=shape.length,
            group=group,
            capacity=shape.window,
            block_size=block_size,
            transposed=False,
        )

    def gathered() -> object:
        alive = causal_top_w(gate, shape.window)
        block = block_size_for(alive, shape.length, shape.window)
        return living_lists(*alive, shape.length, shape.window, block)

    return {"flex": flexed, "gather": gathered}
