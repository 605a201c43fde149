"""Which keys are alive for a block of queries?  The keys that gather attends to.

Slots, as a compiler allocates registers: at most `capacity` keys are alive at any position, so the n-th key to be born takes
the slot that the (n - capacity)-th key to die has left.  The keys alive before a block are then the last ones to have
entered each slot: one sort, ceil(log2 K) rounds of pointer jumping, one cummax; nothing is Q x K.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flexdma.block_metadata import ceil_div
from flexdma.opaque import opaque_on_cpu


def _empty_living_keys(birth: Tensor, death: Tensor, queries: int, capacity: int, block: int) -> list[Tensor]:
    batch, heads, _keys = birth.shape
    shape = (batch, heads, ceil_div(queries, block), capacity + block)
    return [birth.new_empty(shape, dtype=torch.int64), birth.new_empty(shape)]


@opaque_on_cpu("living_keys", _empty_living_keys)
def living_keys(birth: Tensor, death: Tensor, queries: int, capacity: int, block: int) -> list[Tensor]:
    """For each block of queries the keys that some query of it may see, and their death.

    Returns positions [B, H, R, capacity + block] int64 and death, int32.  First `capacity` slots of keys born before the
    block, then the block's own positions in order; a slot without a key has death 0.
    """
    length = birth.shape[-1]
    first_query = length - queries
    blocks = ceil_div(queries, block)
    positions = torch.arange(length, device=birth.device)
    starts = first_query + block * torch.arange(blocks, device=birth.device)

    # Number the keys that ever live by birth (their own position) and by death.
    lives = death > birth
    by_birth = lives.cumsum(-1) - 1
    key_of_death = torch.where(lives, death.long(), 2 * length).sort(dim=-1, stable=True).indices
    # The n-th born takes over from the (n - capacity)-th dead; a key without a predecessor is its own.
    predecessor = key_of_death.gather(-1, (by_birth - capacity).clamp(min=0))
    root = torch.where(lives & (by_birth >= capacity), predecessor, positions)
    hops = 1
    while hops < length:
        root = root.gather(-1, root)
        hops *= 2
    slot = by_birth.gather(-1, root)  # < capacity for every living key

    # last[r, s]: the last key in slot s born before block r starts, -1 for none.
    block_after = (positions - first_query).div(block, rounding_mode="floor").clamp(min=-1) + 1  # 0 .. blocks
    cell = torch.where(lives, block_after * capacity + slot, (blocks + 1) * capacity)
    last = torch.full((*birth.shape[:-1], (blocks + 1) * capacity + 1), -1, device=birth.device)
    last.scatter_reduce_(-1, cell, positions.expand_as(cell), "amax")
    last = last[..., : blocks * capacity].unflatten(-1, (blocks, capacity)).cummax(-2).values

    own = (starts[:, None] + torch.arange(block, device=birth.device)).expand(*birth.shape[:2], -1, -1)
    keys = torch.cat([last, torch.where(own < length, own, -1)], -1)
    index = keys.clamp(min=0)
    death = death.gather(-1, index.flatten(2)).view_as(index)
    return [index, torch.where(keys < 0, 0, death)]


class LivingList(NamedTuple):
    """The keys that some query of a block sees, and no others."""

    keys: Tensor  # [C]: positions in the flattened [B, H, K]
    partial: int  # how many of them, the first ones, are born or die inside the block: all queries see the others


def living_lists(birth: Tensor, death: Tensor, queries: int, capacity: int, block: int) -> list[list[LivingList]]:
    """For each of B H heads, for each of its R blocks of queries: its living keys."""
    keys, last = living_keys(birth, death, queries, capacity, block)
    length = birth.shape[-1]
    starts = length - queries + block * torch.arange(keys.shape[2], device=keys.device)[:, None]
    alive = last > torch.maximum(keys, starts)
    partial = alive & ((keys >= starts) | (last < starts + block))
    # Listed twice, so that one selection takes a block's partial keys and then its others.
    chosen = torch.cat([partial, alive & ~partial], -1)
    keys = keys + length * torch.arange(birth.shape[:2].numel(), device=keys.device).view(*birth.shape[:2], 1, 1)
    lists = torch.cat([keys, keys], -1)[chosen].split(chosen.sum(-1).flatten().tolist())
    every = [LivingList(*pair) for pair in zip(lists, partial.sum(-1).flatten().tolist(), strict=True)]
    return [every[start : start + len(starts)] for start in range(0, len(every), len(starts))]
