"""The families of masks by FlexAttention and by `lifespan_attention`, with the making of the mask inside the timer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from flexdma import Lifespans, lifespan_attention
from flexdma.block_masks import lifespan_block_mask
from flexdma.lifespans.visible import births_are_positions, most_visible
from flexdma.lowerings.default_options import block_size_of
from flexdma.packing.block_index import count_visited
from flexdma.packing.choice import packing_saves
from flexdma.packing.rows import FoldedRows
from flexdma.packing.schedule import schedule
from flexdma.rounding import power_of_two_from
from flexdma.signatures import MaskMod
from flexdma.tools.bench.dense_mask import GIB, free_bytes
from flexdma.tools.mask_families import MaskFamily, mask_families
from flexdma.tools.timing import UnavailableError
from flexdma.tools.whole_calls import Compile

ALONE = "FlexAttention, mask_mod alone"
CREATED, CREATED_COMPILED = "FlexAttention, create_block_mask", "FlexAttention, compiled create_block_mask"
OWN_ORDER, FLEX, DEFAULT = "FlexAttention, lifespan_block_mask", "lifespan_attention, flex", "lifespan_attention"
TILE = 128  # FlexAttention's mask block
# Bytes for each pair that create_block_mask holds at once: a difference of positions in int64, and its comparisons.
PAIR_BYTES = 12


@dataclass(frozen=True)
class MaskSizes:
    """Positions and heads of the calls, and the positions at which making masks is timed alone; B = 1."""

    length: int
    building: int
    query_heads: int
    heads: int
    size: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.heads

    def __str__(self) -> str:
        return f"Hq={self.query_heads} Hkv={self.heads} D={self.size}, N={self.length}"


MASK_SIZES = {"cpu": MaskSizes(8192, 32768, 4, 1, 64), "cuda": MaskSizes(32768, 32768, 16, 4, 128)}
# The families that decide the targets first, because a suite stops when its seconds are used up.
FAMILIES = (
    "random eviction, cache of N / 16", "sliding window", "causal document", "sinks + sliding window", "share question",
    "random eviction, cache of N / 2", "document", "prefix LM document", "QK-sparse", "causal blockwise",
    "global + sliding window", "prefix LM causal", "causal",
)  # fmt: skip
# After the families that decide targets, and before the others.
DECIDING = 6
BUILT = ("random eviction, cache of N / 16", "causal document")


def mask_calls(
    sizes: MaskSizes, name: str, device: str, dtype: torch.dtype, compiler: Compile
) -> dict[str, Callable[[], Tensor]]:
    """Contender -> its call with the family `name`, which makes the mask and attends."""
    family = mask_families(sizes.length, sizes.heads, device)[name]
    random: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    query, key, value = (
        torch.randn((1, heads, sizes.length, sizes.size), **random).to(dtype)
        for heads in (sizes.query_heads, sizes.heads, sizes.heads)
    )
    mask_mod, alive = of_query_heads(family, sizes.group), interval_or_intervals(family)
    attend = partial(compiler(flex_attention), query, key, value, enable_gqa=True)
    build = building_calls(sizes, family, sizes.length, device, dtype, compiler)

    def masked(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return torch.where(mask_mod(b, h, q_idx, kv_idx), score, float("-inf"))

    calls: dict[str, Callable[[], Tensor]] = {
        ALONE: partial(compiler(flex_attention), query, key, value, score_mod=masked, enable_gqa=True)
    }
    for contender in (CREATED, CREATED_COMPILED, OWN_ORDER):
        calls[contender] = partial(_attend_masked, attend, build[contender])
    calls[FLEX] = partial(lifespan_attention, query, key, value, alive, lowering="flex")
    if device == "cpu":
        calls[DEFAULT] = partial(lifespan_attention, query, key, value, alive)
    return calls


def building_calls(
    sizes: MaskSizes, family: MaskFamily, length: int, device: str, dtype: torch.dtype, compiler: Compile
) -> dict[str, Callable[[], Any]]:
    """Contender -> making its mask of `length` positions alone."""
    heads = None if family.heads == 1 else sizes.query_heads
    create: dict[str, Any] = {
        "B": None, "H": heads, "Q_LEN": length, "KV_LEN": length, "device": device, "BLOCK_SIZE": TILE
    }  # fmt: skip
    mask_mod = of_query_heads(family, sizes.group)
    needed = PAIR_BYTES * length**2 * (heads or 1)
    compiled_schedule = compiler(schedule)

    def created() -> BlockMask:
        if needed > 0.7 * free_bytes(device):
            raise UnavailableError(f"skipped: create_block_mask needs about {needed / GIB:.0f} GiB")
        return create_block_mask(mask_mod, **create)

    def placed() -> object:
        alive, facts = one_interval(family), scheduling(sizes, family, length, device, dtype)
        return compiled_schedule(alive, **facts, transposed=False, packed=packing_saves(alive, **facts))

    return {
        CREATED: created,
        CREATED_COMPILED: partial(compiler(create_block_mask), mask_mod, **create),
        OWN_ORDER: lambda: lifespan_block_mask(one_interval(family), num_query_heads=sizes.query_heads),
        FLEX: placed,
    }


def visited_by(sizes: MaskSizes, family: MaskFamily, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Contender -> pairs in the blocks that it visits over pairs of the mask; for masks of one interval a key."""
    length, pairs = sizes.length, family.pairs()
    visits = {ALONE: family.heads * float(length**2) / pairs}
    if len(family.intervals) > 1:
        return visits
    alive = one_interval(family)
    own = TILE**2 * int(count_visited(*alive, queries=length, block_size=(TILE, TILE))) / pairs
    facts = scheduling(sizes, family, length, device, dtype)
    _, index = schedule(alive, **facts, transposed=False, packed=packing_saves(alive, **facts))
    rows, columns = facts["block_size"]
    visits |= dict.fromkeys((CREATED, CREATED_COMPILED, OWN_ORDER), own)
    return visits | {FLEX: rows * columns * int(index.visited().sum()) / (pairs * sizes.group)}


def scheduling(sizes: MaskSizes, family: MaskFamily, length: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments with which an eager `lifespan_attention` packs these keys, which it reads from the device."""
    alive, block_size = one_interval(family), block_size_of(torch.device(device), dtype, sizes.size, sizes.group, False)
    return {
        "rows": FoldedRows.of(length, sizes.group, block_size[0], device),
        "capacity": power_of_two_from(most_visible(alive, length)),
        "block_size": block_size,
        "any_births": not births_are_positions(alive),
        "ranked": False,
    }


def of_query_heads(family: MaskFamily, group: int) -> MaskMod:
    """The mask_mod of query heads, which FlexAttention passes."""
    mask_mod = family.mask_mod
    if family.heads == 1:
        return lambda b, h, q_idx, kv_idx: mask_mod(b, h * 0, q_idx, kv_idx)
    return lambda b, h, q_idx, kv_idx: mask_mod(b, h // group, q_idx, kv_idx)


def interval_or_intervals(family: MaskFamily) -> Any:
    """The lifespans as `lifespan_attention` takes them."""
    return family.intervals[0] if len(family.intervals) == 1 else family.intervals


def one_interval(family: MaskFamily) -> Lifespans:
    """The lifespans of a mask of one interval a key."""
    if len(family.intervals) > 1:
        raise UnavailableError("skipped: keys of this mask have two intervals")
    return family.intervals[0]


def _attend_masked(attend: Callable[..., Tensor], build: Callable[[], BlockMask]) -> Tensor:
    return attend(block_mask=build())
