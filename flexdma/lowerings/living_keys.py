"""The living keys of each block of queries: the keys that gather attends to.

Keys get slots as variables get registers in a compiler.  At most `capacity` keys are alive at any position, so the n-th key
born takes the slot of the (n - capacity)-th key that dies.  The keys alive before a block are then the last key of each
slot.  One sort, at most ceil(log2 K) rounds of pointer jumping, one cummax; no Q x K tensor exists.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexdma.opaque import opaque_on_cpu
from flexdma.rounding import ceil_div, levels
from flexdma.stages import staged
from flexdma.transforms import is_exporting

# Blocks times heads that `living_lists` computes at once: few enough that its integers stay in cache.
BLOCKS_AT_ONCE = 32


def number_of_blocks(queries: int, block: int) -> int:
    """Blocks that hold these queries.  Under torch.export at least two, because programs guard sizes of 1."""
    blocks = ceil_div(queries, block)
    return torch.sym_max(2, blocks) if is_exporting() else blocks


def _empty_living_keys(birth: Tensor, death: Tensor, queries: int, capacity: int, block: int) -> list[Tensor]:
    batch, heads, _keys = birth.shape
    shape = (batch, heads, number_of_blocks(queries, block), capacity + block)
    return [birth.new_empty(shape, dtype=torch.int64), birth.new_empty(shape)]


@staged("living keys")
@opaque_on_cpu("living_keys", _empty_living_keys)
def living_keys(birth: Tensor, death: Tensor, queries: int, capacity: int, block: int) -> list[Tensor]:
    """For each block of queries the keys that some query of it may see, and their deaths.

    Returns positions int64 and deaths int32, both [B, H, R, capacity + block]: first `capacity` slots with keys born before
    the block, then the block's own positions in order.  An empty slot has an arbitrary valid position and death 0.
    """
    first_query = birth.shape[-1] - queries
    slot = _slots(birth, death, capacity)
    before = _entered(slot, capacity, first_query)
    keys, _ = _by_block(slot[..., first_query:], before, first_query, number_of_blocks(queries, block), block)
    index = keys.clamp(min=0).long()
    death = death.gather(-1, index.flatten(2)).view_as(index)
    return [index, torch.where(keys < 0, 0, death)]


class LivingList(NamedTuple):
    """Exactly the keys that some query of a block sees."""

    keys: Tensor  # [C]: positions in the flattened [B, H, K]
    partial: int  # keys[:partial] are born or die inside the block; every query of the block sees the others


@staged("living keys")
def living_lists(birth: Tensor, death: Tensor, queries: int, capacity: int, block: int) -> list[list[LivingList]]:
    """For each of B H heads, for each of its R blocks of queries, the living keys.  The lists are ragged, so eager only."""
    length, heads = birth.shape[-1], birth.shape[:2].numel()
    birth, death = birth.reshape(1, heads, length), death.reshape(1, heads, length)
    slot = _slots(birth, death, capacity)
    before = _entered(slot, capacity, length - queries)
    offsets = length * torch.arange(heads, device=birth.device).view(1, heads, 1, 1)
    lists: list[list[LivingList]] = [[] for _ in range(heads)]
    step = block * max(1, BLOCKS_AT_ONCE // max(1, heads))
    for start in range(length - queries, length, step):
        keys, before = _by_block(
            slot[..., start : start + step], before, start, ceil_div(min(step, length - start), block), block
        )
        index = keys.clamp(min=0).long()
        last = death.gather(-1, index.flatten(2)).view_as(index)
        starts = start + block * torch.arange(keys.shape[2], dtype=torch.int32, device=keys.device)[:, None]
        # Where keys < 0 the slot is empty.
        alive = (last > torch.maximum(keys, starts)) & (keys >= 0)
        partial = alive & ((keys >= starts) | (last < starts + block))
        # The index is repeated, so that one boolean selection returns the partial keys of a block and then its others.
        index = index + offsets
        chosen = torch.cat([partial, alive & ~partial], -1)
        parts = torch.cat([index, index], -1)[chosen].split(chosen.sum(-1).flatten().tolist())
        pairs = zip(parts, partial.sum(-1).flatten().tolist(), strict=True)
        for number, pair in enumerate(pairs):
            lists[number // len(starts)].append(LivingList(*pair))
    return lists


def _slots(birth: Tensor, death: Tensor, capacity: int) -> Tensor:
    """[B, H, K] int64: the slot of each key, < capacity; capacity for a key that is never visible."""
    length = birth.shape[-1]
    positions = torch.arange(length, device=birth.device)
    # Number the keys that are ever visible by birth (their own position) and by death.
    lives = death > birth
    by_birth = lives.cumsum(-1) - 1
    key_of_death = torch.where(lives, death.long(), 2 * length).sort(dim=-1, stable=True).indices
    # The n-th key born takes over the slot of the (n - capacity)-th to die.  The first `capacity` keys are their own roots.
    predecessor = key_of_death.gather(-1, (by_birth - capacity).clamp(min=0))
    root = torch.where(lives & (by_birth >= capacity), predecessor, positions)
    for _ in range(levels(length)):
        further = root.gather(-1, root)
        # Most chains are short.  On a CPU the comparison needs no synchronisation.
        if root.device.type == "cpu" and not is_exporting() and torch.equal(further, root):
            break
        root = further
    return torch.where(lives, by_birth.gather(-1, root), capacity)


def _entered(slot: Tensor, capacity: int, position: int) -> Tensor:
    """[B, H, capacity] int32: the last key that entered each slot before `position`; -1 for none."""
    last = torch.full((*slot.shape[:-1], capacity + 1), -1, dtype=torch.int32, device=slot.device)
    keys = torch.arange(position, dtype=torch.int32, device=slot.device).expand(*slot.shape[:-1], -1)
    return last.scatter_reduce(-1, slot[..., :position], keys, "amax")[..., :capacity]


def _by_block(slot: Tensor, before: Tensor, start: int, blocks: int, block: int) -> tuple[Tensor, Tensor]:
    """The keys of `blocks` blocks of queries from position `start` on, and the last key of each slot after them.

    slot: of the keys from `start` to the end of these blocks, or to the last key.  before: `_entered` at `start`.
    Returns [B, H, blocks, capacity + block] and [B, H, capacity], int32, -1 for none.
    """
    capacity, end = before.shape[-1], start + slot.shape[-1]
    integers = partial(torch.arange, dtype=torch.int32, device=slot.device)
    born = integers(start, end).expand(*slot.shape[:-1], -1)
    # A sum of two, not one range that is reshaped, which torch.export would guard.
    own = (start + block * integers(blocks))[:, None] + integers(block)
    # Row r collects the keys that entered during block r - 1.  One extra cell collects the keys that are never visible.
    # Counted, not born - start, in a compiled program: for index // block Inductor splits the loop over all keys into whole
    # blocks and drops the keys beyond the last whole one (torch 2.13).
    number = (slot >= 0).cumsum(-1) - 1 if is_exporting() else born - start
    row = number.div(block, rounding_mode="floor").long() + 1
    cell = torch.where(slot < capacity, row * capacity + slot, (blocks + 1) * capacity)
    last = pad(before, (0, blocks * capacity + 1), value=-1).scatter_reduce(-1, cell, born, "amax")
    last = last[..., :-1].unfold(-1, capacity, capacity).cummax(-2).values
    own = torch.where(own < end, own, -1).expand(*slot.shape[:-1], -1, -1)
    return torch.cat([last[..., :-1, :], own], -1), last[..., -1, :]
