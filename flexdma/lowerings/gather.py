"""The gather lowering: gather the living keys of each block of queries, then plain batched attention.

O(N (w + block)) time, differentiable in every argument, on every device and dtype; torch.compile traces it as one batched
expression.  Eager calls compute a few query blocks at a time, so that scores stay in cache.  Eager training keeps the
gathered keys and values, (w + block) / block times K, and recomputes the scores where there are many.  CPU calls without
gradients go to fused.py.  living_keys.py finds the living keys of a block.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from flexdma.lifespans import Lifespans
from flexdma.lowerings import fused
from flexdma.lowerings.gather_blocks import Blocks, attend_blocks
from flexdma.lowerings.living_keys import living_keys
from flexdma.lowerings.sink_logits import sink_scores
from flexdma.lowerings.timeline import attend_any_births
from flexdma.packing import along_keys
from flexdma.rounding import ceil_div
from flexdma.signatures import ScoreMod
from flexdma.stages import staged
from flexdma.transforms import can_read, is_exporting, is_transformed

# Queries per block: the best of 32 .. 256 on a CPU, measured (docs/benchmarks.md).
BLOCK_SIZE = 128
# Eager: score elements computed at a time (8 MiB of float32, about a core's share of cache), and the number above which
# the backward recomputes them instead of keeping them (256 MiB).
CHUNK_ELEMENTS = 2**21
KEPT_ELEMENTS = 2**26


def gather_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    lifespans: Lifespans,
    *,
    in_order: bool | None,
    ranked: bool,
    capacity: int,
    scale: float,
    score_mod: ScoreMod | None,
    block_size: int | None,
    sink_logits: Tensor | None,
) -> Tensor:
    """softmax(score_mod(q . k * scale) + bias) v over the keys alive at each query; see `lifespan_attention`.

    in_order, ranked: see `flexdma.lowerings.attend`.
    block_size: of queries; None = BLOCK_SIZE, or `fused.block_size_for`.
    """
    capacity = min(capacity, key.shape[2])
    if score_mod is None and fused.is_fusible(query, key, value, bias, sink_logits):
        return fused.fused_attend(
            query, key, value, bias, lifespans, in_order=in_order, ranked=ranked, capacity=capacity, scale=scale,
            block_size=block_size, sink_logits=sink_logits,
        )  # fmt: skip
    queries, keys = query.shape[2], key.shape[2]
    if is_exporting() and not (has_static_value(queries) and has_static_value(keys)):
        raise ValueError(
            "lowering: 'gather' exports symbolic lengths only on a CPU, without gradients, a score_mod and unequal head "
            "sizes; expected torch.no_grad() around torch.export.export, lowering='dense', or static lengths"
        )
    attend = partial(
        _attend_in_order, capacity=capacity, scale=scale, block_size=block_size or BLOCK_SIZE, sink_logits=sink_logits
    )
    return attend_any_births(
        attend, query, key, value, bias, lifespans, in_order=in_order, ranked=ranked, exact=sink_logits is not None,
        score_mod=score_mod, reads_device=can_read(query),
    )  # fmt: skip


@staged("attention forward")
def _attend_in_order(
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
    block_size: int,
    sink_logits: Tensor | None,
) -> Tensor:
    """`gather_attend` for keys born at their own positions; bias [B, Hkv, K], reference [B, Hkv, Q]."""
    batch, query_heads, queries, _size = query.shape
    heads, keys = key.shape[1:3]
    group = query_heads // heads
    first_query = keys - queries
    blocks = ceil_div(queries, block_size)

    slots, death = living_keys(lifespans.birth, lifespans.death, queries, capacity, block_size)
    slots = slots.expand(batch, heads, -1, -1)  # [B, Hkv, R, C]: positions of the keys
    death = death.expand_as(slots)

    beyond = (0, blocks * block_size - queries)
    reference = pad(reference, beyond).unflatten(-1, (blocks, block_size))  # [B, Hkv, R, M]
    sink = None
    if sink_logits is not None:
        sink = sink_scores(sink_logits, reference.flatten(2)).unflatten(2, (blocks, block_size))
    reference = reference.detach()
    # 0 * NaN is NaN: a NaN in a key that no query sees would reach all queries that gather it.
    never = (lifespans.death <= lifespans.birth)[..., None]
    key, value = key.masked_fill(never, 0.0), value.masked_fill(never, 0.0)
    rows = pad(query, (0, 0, *beyond))
    rows = rows.unflatten(2, (blocks, block_size)).unflatten(1, (heads, group)).transpose(2, 3)  # [B, Hkv, R, G, M, D]
    # Rows beyond the last query get its position, so score_mod never sees one out of range.  They are dropped at the end.
    positions = torch.arange(first_query, first_query + blocks * block_size, device=query.device).clamp(max=keys - 1)
    gathered = _take(bias, slots)
    # Hidden keys have a finite score, which would outweigh that of a visible key with a bias of -inf.
    death = death.masked_fill(gathered.detach() == float("-inf"), 0)
    every = Blocks(rows, gathered, reference, slots, death, positions.view(1, 1, blocks, block_size), sink)

    elements = batch * query_heads * blocks * block_size * slots.shape[-1]
    if torch.compiler.is_compiling() or elements <= CHUNK_ELEMENTS:
        output = attend_blocks(_take(key, slots), _take(value, slots), every, scale=scale, score_mod=score_mod)
    else:
        output = torch.cat(_in_chunks(key, value, every, elements, scale, score_mod), 2)
    # Join heads first, then drop the rows beyond the last query: in this order symbolic lengths need no guard.
    return output.transpose(2, 3).flatten(1, 2).flatten(2, 3)[:, :, :queries]


def _in_chunks(
    key: Tensor, value: Tensor, every: Blocks, elements: int, scale: float, score_mod: ScoreMod | None
) -> list[Tensor]:
    """`attend_blocks` on about CHUNK_ELEMENTS of the `elements` scores at a time."""
    step = max(1, CHUNK_ELEMENTS * every.slots.shape[2] // elements)
    chunks = every.split(step)
    attend: Callable[..., Tensor] = partial(attend_blocks, scale=scale, score_mod=score_mod)
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
