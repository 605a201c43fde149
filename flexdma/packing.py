"""Packing: an order of the keys in which the visible ones lie together, so that whole blocks can be skipped.

Attention does not care about the order of its keys, only a block mask does.  In natural order a key that outlives its
neighbours keeps their whole block alive; packed, keys of similar lifespans share blocks.

Keys are put in classes by lifetime: at most 2 w steps, then up to 8 w, 32 w, ...; inside a class they stand in order of
death; keys that no query sees go last.  For every input (proof in docs/packing.md) a query block of q positions, q <= w,
visits on average at most  (7 w + 2 q) / kv_block + 2 (max(0, ceil(log4(K / 2w))) + 1)  key blocks; measured over seven gate
families it is 1.3 to 2.1 times the ideal w / kv_block in blocks of 128 x 128.  `most_visited` bounds every single one.
"""

import torch
from torch import Tensor

from flexdma.lifespans import Lifespans

FIRST_CLASS = 2  # in units of w: measured best with base 4 over the seven families, blocks of 128 x 128 and of 32 x 64
CLASS_BASE = 4


def pack(lifespans: Lifespans, window_size: int, *, first_query: int = 0) -> Tensor:
    """The order of keys to attend in: a permutation [B, H, K] int64, `packed = natural.gather(-1, order)`.

    lifespans: birth, death [B, H, K].
    window_size: the unit of lifetime; any value >= 1 is correct, the number of keys a query sees is best.
    first_query: the position of the first query; keys dead by then count as never visible.

        birth = [0 1 2 3 4], death = [2 5 3 3 5], window_size = 1       order = [0 2 4 1 3]
                                                    (lifetimes up to 2 by death, then the longer, then the dead)

    One sort; O(K log K) time, O(K) memory.
    """
    birth, death = lifespans.birth.clamp(min=first_query), lifespans.death
    length = birth.shape[-1]
    lifetime = death - birth
    lifetime_class = torch.zeros_like(lifetime)
    bound = FIRST_CLASS * window_size
    while bound < length:
        lifetime_class += lifetime > bound
        bound *= CLASS_BASE
    never = lifetime <= 0
    # One number for one sort: class, then death; int64 because their product is not bounded by K.
    place = torch.where(never, length, lifetime_class).long() * (length + 1) + torch.where(never, 0, death)
    return place.sort(dim=-1, stable=True).indices


def along_keys(tensor: Tensor, order: Tensor) -> Tensor:
    """Keys [B, H, K, ...] at the places of order [B, H, n] int64: [B, H, n, ...]."""
    trailing = tensor.shape[3:]
    return tensor.gather(2, order.view(*order.shape, *[1] * len(trailing)).expand(*order.shape, *trailing))


def most_visited(keys: int, capacity: int, positions: int, columns: int) -> int:
    """No block of `positions` queries visits more key blocks than this, whatever the gates (proof in docs/packing.md).

    keys: K.  capacity: no position has more living keys; the `window_size` that the keys were packed with.
    columns: keys of a block.
    """
    blocks = (5 * capacity + positions) // columns + 2
    longest = FIRST_CLASS * capacity
    while longest < keys:
        # Keys that live longer than this, up to CLASS_BASE times as long.
        blocks += capacity * (CLASS_BASE + 1 + -(-positions // longest)) // columns + 2
        longest *= CLASS_BASE
    return min(blocks, capacity + positions, -(-keys // columns))
