"""The sections of the suite "masks": whole calls with each family, and making its mask alone."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from flexdma.tools.bench.mask_contenders import CREATED, MASK_SIZES, building_calls, mask_calls, visited_by
from flexdma.tools.bench.visited import VISITED
from flexdma.tools.mask_families import mask_families
from flexdma.tools.timing import SIZE_ROUNDS, Turns, interleaved

if TYPE_CHECKING:
    from flexdma.tools.bench.sections import Setting

CALLS, BUILDING = "masks", "mask building"


def measure_masks(family: str, setting: "Setting", turns: Turns) -> Iterator[tuple[str, str, Any]]:
    """One family of masks by FlexAttention and by `lifespan_attention`."""
    sizes = MASK_SIZES[setting.device]
    calls = mask_calls(sizes, family, setting.device, setting.dtype, setting.compiler)
    with torch.no_grad():
        yield from interleaved(calls, _few(turns), memory=False).rows()
    turns.tick("")
    found = mask_families(sizes.length, sizes.heads, setting.device)[family]
    for name, ratio in visited_by(sizes, found, setting.device, setting.dtype).items():
        yield name, VISITED, ratio


def measure_mask_building(family: str, setting: "Setting", turns: Turns) -> Iterator[tuple[str, str, Any]]:
    """Making the mask of one family alone, and its peak memory."""
    sizes = MASK_SIZES[setting.device]
    found = mask_families(sizes.building, 1, setting.device)[family]
    calls = building_calls(sizes, found, sizes.building, setting.device, setting.dtype, setting.compiler)
    # It compiles nothing, and on a CPU a run takes ten seconds.
    created = {CREATED: calls.pop(CREATED)}
    yield from interleaved(calls, _few(turns)).rows()
    yield from interleaved(created, replace(turns, rounds=1), warm_up=False).rows()


def _few(turns: Turns) -> Turns:
    return replace(turns, rounds=min(turns.rounds, SIZE_ROUNDS))
