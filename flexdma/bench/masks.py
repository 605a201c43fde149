"""Masks without attention: how well packing fills the blocks, and the memory that building masks and metadata takes."""

from collections.abc import Callable

from torch import Tensor

from flexdma import causal_top_w, pack
from flexdma.bench.families import gate_families
from flexdma.bench.shapes import Shape
from flexdma.block_metadata import block_metadata
from flexdma.lowerings import flex
from flexdma.lowerings.fused import block_size_for
from flexdma.lowerings.living_keys import living_lists


def packing_ratios(length: int, window: int, rows: int, columns: int) -> dict[str, tuple[float, float]]:
    """Family -> visited blocks over the ideal N w, in natural order and packed; tiles of rows positions by columns keys."""
    ratios = {}
    for name, gate in gate_families(length).items():
        lifespans = causal_top_w(gate[None, None], window)
        visible = (lifespans.death - lifespans.birth).sum().item()
        order = pack(lifespans, window)
        packed = [t.gather(-1, order) for t in lifespans]
        counts = [block_metadata(b, d, length, 1, rows, columns, False) for b, d in (lifespans, packed)]
        natural, dense = ((c[0] + c[2]).sum().item() * rows * columns / visible for c in counts)
        ratios[name] = (natural, dense)
    return ratios


def mask_memory(shape: Shape, gate: Tensor) -> dict[str, Callable[[], object]]:
    """What builds masks and metadata, to be measured for peak memory."""
    group = shape.query_heads // shape.heads
    rows, columns = flex.default_block_size(gate.device.type, group, shape.length)

    def flexed() -> object:
        lifespans = causal_top_w(gate, shape.window)
        order = pack(lifespans, shape.window)
        birth, death = (t.gather(-1, order) for t in lifespans)
        most = flex._most_visited(birth, group, shape.window, rows, columns)
        return order, block_metadata(birth, death, shape.length, group, rows, columns, False, most)

    def gathered() -> object:
        alive = causal_top_w(gate, shape.window)
        block = block_size_for(alive, shape.length, shape.window)
        return living_lists(*alive, shape.length, shape.window, block)

    return {"flex": flexed, "gather": gathered}
