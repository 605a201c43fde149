"""A call cut into chunks: blocks of queries that one call of the fused kernel computes, with the keys that they see."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flexdma.lifespans import Lifespans
from flexdma.lifespans.terms import terms_per_key
from flexdma.lifespans.visible import births_are_positions, seen_by_queries, without_unseen
from flexdma.lowerings.float_mask import without_nan
from flexdma.lowerings.fused_blocks import AllKeys, Gathered, gathered
from flexdma.lowerings.living_keys import LivingList, living_lists
from flexdma.lowerings.living_terms import living_terms

# Queries per block.  From 192 rows on the kernel multiplies 64 at a time, from 768 on 256, and rereads keys less often.
SMALL_BLOCK, BLOCK_SIZE, LARGE_BLOCK = 128, 256, 1024
# A large block pays while its own births add less than this share to the keys that a query sees.
FEW_BIRTHS = 1 / 4
# A small block pays where the births of a block of BLOCK_SIZE add more than this share.
MANY_BIRTHS = 3 / 5
# Scores per kernel call and thread: enough work for every thread, with a mask that stays in cache.
SCORES_PER_THREAD = 2**20


def block_size_for(lifespans: Lifespans, queries: int, capacity: int, terms_per_key: int = 1) -> int:
    """Queries per block: the more, the fewer keys are born in a block beside those that a query sees.

    Of several intervals one begins where another ends: a large block would contain many keys twice (1.15 times as slow).
    """
    if queries <= SMALL_BLOCK or terms_per_key > 1:
        return BLOCK_SIZE
    born, dies = seen_by_queries(lifespans, queries)
    births = ((dies > born) & (born > 0)).sum(-1).float().mean().item() / queries
    # Not the capacity alone: of documents it is the longest, and most queries see far fewer keys.
    visible = min(capacity, (dies - born).clamp(min=0).sum(-1).float().mean().item() / queries)
    if births * BLOCK_SIZE > MANY_BIRTHS * visible:
        return SMALL_BLOCK
    return LARGE_BLOCK if queries >= 8 * LARGE_BLOCK and births * LARGE_BLOCK <= FEW_BIRTHS * visible else BLOCK_SIZE


class Chunk(NamedTuple):
    """n blocks of queries: consecutive blocks of one head, or all blocks of consecutive heads."""

    where: tuple[slice, slice]  # in a tensor of `Strip.blocks`
    keys: Gathered | None  # None where no query of the chunk sees a key


class Strip(NamedTuple):
    """R blocks of M queries of every head.  The last queries of a head may make a second strip of one shorter block."""

    queries: slice  # of Q
    block: int  # M
    chunks: Iterator[Chunk]

    def blocks(self, tensor: Tensor) -> Tensor:
        """A view of [B Hkv, G, Q, ...] as [B Hkv, R, G, M, ...]."""
        return tensor[:, :, self.queries].unflatten(2, (-1, self.block)).transpose(1, 2)


class Cut:
    """The strips of a call with queries [B, Hq, Q, D], keys [B, Hkv, K, D] and their terms.

    bias [B, Hkv, P K], reference [B, Hkv, Q].  computed: the dtype of scores.
    in_order: whether P = 1 and each key that is ever visible is born at its own position; None = not known.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor,
        reference: Tensor,
        lifespans: Lifespans,
        capacity: int,
        block_size: int | None,
        in_order: bool | None,
        computed: torch.dtype,
    ) -> None:
        batch, heads, _keys, size = key.shape
        queries, terms = query.shape[2], bias.shape[2]
        each = terms_per_key(bias, key)
        lifespans = without_unseen(Lifespans(*(bound.expand(batch, heads, terms) for bound in lifespans)), queries)
        self.heads, self.group = batch * heads, query.shape[1] // heads
        self.queries, self.capacity, self.computed = queries, capacity, computed
        self.block = min(block_size or block_size_for(lifespans, queries, capacity, each), queries)
        if in_order is None:
            in_order = each == 1 and births_are_positions(lifespans)
        if in_order:
            self.lists = living_lists(*lifespans, queries, capacity, self.block)
        else:
            self.lists = living_terms(lifespans, queries, self.block)
        # From here on the terms of all heads are in one row, [B Hkv P K].
        head_starts = terms * torch.arange(self.heads, device=key.device)[:, None]
        starts = torch.arange(terms - queries, terms, self.block, device=key.device)
        self.block_starts = head_starts + starts  # [B Hkv, R]
        birth, death = ((bound.flatten(0, 1) + head_starts).flatten() for bound in lifespans)
        self.reference = reference.flatten(0, 1)
        self.every_key = AllKeys(
            key.reshape(-1, size),
            value.reshape(-1, size),
            without_nan(bias).flatten(),
            None if in_order else birth,
            death,
            each,
        )

    def by_head(self, tensor: Tensor) -> Tensor:
        """[B, Hq, ...] -> [B Hkv, G, ...]."""
        return tensor.reshape(self.heads, self.group, *tensor.shape[2:])

    def strips(self) -> Iterator[Strip]:
        """The strips of all queries."""
        whole, rest = divmod(self.queries, self.block)
        if whole:
            yield self._strip(0, whole, self.block)
        if rest:
            yield self._strip(whole, whole + 1, rest)

    def _strip(self, start: int, end: int, block: int) -> Strip:
        """Blocks `start` .. `end` - 1 of all heads, each of `block` queries."""
        first = start * self.block
        queries = slice(first, first + (end - start) * block)
        return Strip(queries, block, self._chunks(start, end, self.reference[:, queries].unflatten(1, (-1, block))))

    def _chunks(self, start: int, end: int, reference: Tensor) -> Iterator[Chunk]:
        scores = self.group * reference.shape[2] * (self.capacity + reference.shape[2])
        most = max(1, torch.get_num_threads() * SCORES_PER_THREAD // scores)
        heads = max(1, most // (end - start))  # at a time, if one chunk fits all their blocks
        starts = self.block_starts[:, start:end]
        for h in range(0, self.heads, heads):
            lists = [head[start:end] for head in self.lists[h : h + heads]]
            for r in range(0, end - start, most):
                some = [each for head in lists for each in head[r : r + most]]
                where = (slice(h, h + heads), slice(r, r + most))
                yield Chunk(where, self._gathered(where, some, starts, reference))

    def _gathered(
        self, where: tuple[slice, slice], lists: list[LivingList], starts: Tensor, reference: Tensor
    ) -> Gathered | None:
        if not any(len(each.keys) for each in lists):
            return None
        return gathered(reference[where].flatten(0, 1), starts[where].flatten(), lists, self.every_key, self.computed)
