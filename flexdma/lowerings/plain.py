"""Gather in plain PyTorch operations: on every device and dtype, with any score_mod, differentiable any number of times.

torch.compile traces it as one batched expression.  Eager calls compute a few query blocks at a time, so that scores stay in
cache.  Eager training keeps the gathered keys and values, (w + block) / block times K, and recomputes the scores where there
are many.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from flexdma.lifespans import Lifespans
from flexdma.lowerings.living_keys import living_keys, number_of_blocks
from flexdma.lowerings.masked_blocks import attend_masked_blocks
from flexdma.lowerings.plain_blocks import Blocks, attend_blocks
from flexdma.packing import along_keys
from flexdma.signatures import ScoreMod
from flexdma.stages import staged
from flexdma.transforms import is_exporting, is_transformed

# Queries per block: the best of 32 .. 256 on a CPU, measured (docs/benchmarks.md).
BLOCK_SIZE = 128
# Eager: score elements computed at a time (8 MiB of float32, about a core's share of cache), and the number above which
# the backward recomputes them instead of keeping them (256 MiB).
CHUNK_ELEMENTS = 2**21
KEPT_ELEMENTS = 2**26


@staged("attention forward")
def plain_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    reference: Tensor,
    lifespans: Lifespans,
    score_mod: ScoreMod | None,
    *,
    capacity: int,
    scale: float,
    block_size: int | None,
    log_sum: bool,
    masked: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention to keys born at their own positions -> [B, Hq, Q, Dv], and the log-sum-exp of scores, [B, Hq, Q].

    bias [B, Hkv, K], reference [B, Hkv, Q] without a gradient.  log_sum: False returns None instead of the log-sum-exp.
    A row that sees no key gives 0, and an arbitrary log-sum-exp.
    masked: whether to run PyTorch's CPU kernel with a mask; without a score_mod and a gradient.
    """
    batch, query_heads, queries, _size = query.shape
    heads, keys = key.shape[1:3]
    group = query_heads // heads
    first_query = keys - queries
    block = block_size or BLOCK_SIZE
    blocks = number_of_blocks(queries, block)

    slots, death = living_keys(lifespans.birth, lifespans.death, queries, capacity, block)
    slots = slots.expand(batch, heads, -1, -1)  # [B, Hkv, R, C]: positions of the keys
    death = death.expand_as(slots)

    beyond = (0, blocks * block - queries)
    reference = pad(reference, beyond).unflatten(-1, (blocks, block))  # [B, Hkv, R, M]
    # 0 * NaN is NaN: a NaN in a key that no query sees would reach all queries that gather it.
    never = (lifespans.death <= lifespans.birth)[..., None]
    key, value = key.masked_fill(never, 0.0), value.masked_fill(never, 0.0)
    rows = pad(query, (0, 0, *beyond))
    rows = rows.unflatten(2, (blocks, block)).unflatten(1, (heads, group)).transpose(2, 3)  # [B, Hkv, R, G, M, D]
    # Rows beyond the last query get its position, so score_mod never sees one out of range.  They are dropped at the end.
    positions = torch.arange(first_query, first_query + blocks * block, device=query.device).clamp(max=keys - 1)
    gathered = _take(bias, slots)
    # Hidden keys have a finite score, which would outweigh that of a visible key with a bias of -inf.
    death = death.masked_fill(gathered.detach() == float("-inf"), 0)
    every = Blocks(rows, gathered, reference, slots, death, positions.view(1, 1, blocks, block))

    def joined(tensor: Tensor) -> Tensor:
        """[B, Hkv, R, G, M, ...] -> [B, Hq, Q, ...]."""
        # Join heads first, then drop the rows beyond the last query: in this order symbolic lengths need no guard.
        tensor = tensor.transpose(2, 3).flatten(1, 2).flatten(2, 3)
        if is_exporting():  # which guards the strides of a view
            return tensor.index_select(2, torch.arange(queries, device=tensor.device))
        return tensor[:, :, :queries]

    elements = batch * query_heads * blocks * block * slots.shape[-1]
    if masked:
        output = attend_masked_blocks(_take(key, slots), _take(value, slots), every, scale=scale, log_sum=log_sum)
    elif torch.compiler.is_compiling() or elements <= CHUNK_ELEMENTS:
        output = attend_blocks(
            _take(key, slots), _take(value, slots), every, scale=scale, score_mod=score_mod, log_sum=log_sum
        )
    else:
        chunks = _in_chunks(key, value, every, elements, scale, score_mod, log_sum)
        output = [torch.cat(parts, 2) for parts in zip(*chunks, strict=True)]
    return joined(output[0]), joined(output[1]) if log_sum else None


def _in_chunks(
    key: Tensor,
    value: Tensor,
    every: Blocks,
    elements: int,
    scale: float,
    score_mod: ScoreMod | None,
    log_sum: bool,
) -> list[Sequence[Tensor]]:
    """`attend_blocks` on about CHUNK_ELEMENTS of the `elements` scores at a time."""
    step = max(1, CHUNK_ELEMENTS * every.slots.shape[2] // elements)
    chunks = every.split(step)
    attend: Callable[..., Sequence[Tensor]] = partial(attend_blocks, scale=scale, score_mod=score_mod, log_sum=log_sum)
    if not torch.is_grad_enabled():
        return [attend(_take(key, chunk.slots), _take(value, chunk.slots), chunk) for chunk in chunks]
    if elements > KEPT_ELEMENTS and not is_transformed():  # torch.func does not support checkpoints
        attend = partial(checkpoint, attend, use_reentrant=False, preserve_rng_state=False)
    # Gather all chunks at once, because the gradient of each gather is as large as all keys.
    taken = (_take(tensor, every.slots).split(step, 2) for tensor in (key, value))
    return [attend(*chunk) for chunk in zip(*taken, chunks, strict=True)]


@staged("key/value gather")
def _take(tensor: Tensor, slots: Tensor) -> Tensor:
    """[B, Hkv, K, ...] at [B, Hkv, R, C] -> [B, Hkv, R, C, ...]."""
    return along_keys(tensor, slots.flatten(2)).unflatten(2, slots.shape[2:])
