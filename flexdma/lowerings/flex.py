"""The flex lowering: keys packed by lifespan, then FlexAttention (arXiv 2412.05496), fused by Inductor.

Inductor generates the kernel: Triton on CUDA (forward and backward), C++ on a CPU (inference only: torch has no CPU
backward).  The query heads of a group are folded into the rows of one head, row i * G + g, so that one mask and one visit
of a key block serve the whole group.
"""

from collections.abc import Callable
from operator import index

import torch
from torch import Tensor

from flexdma.block_metadata import block_mask_from, block_metadata
from flexdma.lifespans import Lifespans
from flexdma.lowerings import gate_gradient
from flexdma.offsets import reference_gate, split
from flexdma.opaque import opaque_on_cpu, realize
from flexdma.order_statistics import scattered
from flexdma.packing import along_keys, most_visited, pack
from flexdma.signatures import ScoreMod

# (rows, keys) of a mask block.  CUDA: what FlexAttention's Triton tiles divide.  CPU: measured (docs/benchmarks.md).
BLOCK_SIZE = {"cuda": (128, 128), "cpu": (128, 32)}
# From so many keys on, a block on a GPU is 128 positions high instead of 128 rows (docs/packing.md).
LONG = 2**18
# Compilations of one process's eager calls: one per dtype, head layout, score_mod and, on a CPU, shape.
RECOMPILE_LIMIT = 64


def default_block_size(device_type: str, group: int, keys: int) -> tuple[int, int]:
    """(rows, keys) of a mask block where the caller names none; group: query heads, and so rows, of a position.

    Flat blocks of 128 / group positions fit the mask closer.  Metadata has a number for each pair of blocks while it is made,
    which outweighs that for long sequences.
    """
    rows, columns = BLOCK_SIZE.get(device_type, BLOCK_SIZE["cuda"])
    return (rows * group if device_type != "cpu" and keys >= LONG else rows), columns


def flex_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    lifespans: Lifespans,
    *,
    unit: int,
    scale: float,
    score_mod: ScoreMod | None,
    block_size: tuple[int, int],
    kernel_options: dict | None,
    needs_gradient: bool,
) -> Tensor:
    """softmax(score_mod(q . k * scale) + gate) v over the keys alive at each query; see `dynamic_mask_attention`.

    unit: no position has more living keys.  Packing counts lifetimes in it, and index tensors are as long as follows.
    Must be compiled: uncompiled, FlexAttention materialises Q x K scores.
    """
    batch, query_heads, queries, size = query.shape
    heads, keys = key.shape[1:3]
    if query.device.type == "cpu":
        # Constants in the graph: Inductor's C++ kernel mistakes one symbolic size for another (torch 2.11 to 2.13).
        batch, queries, keys = index(batch), index(queries), index(keys)
    group = query_heads // heads
    first_query = keys - queries

    order, birth, death, *metadata = _schedule(
        lifespans.birth, lifespans.death, queries, group, unit, block_size[0], block_size[1], needs_gradient
    )

    def per_head(tensor: Tensor) -> Tensor:
        return realize(tensor.expand(batch, heads, tensor.shape[-1]))

    birth, death = per_head(birth), per_head(death)
    packed = _permutation(order.expand(batch, heads, keys), needs_gradient)
    packed_key, packed_value = packed(key), packed(value)
    rows = query.unflatten(1, (heads, group)).transpose(2, 3).reshape(batch, heads, queries * group, size)

    gate = gate.expand(batch, heads, keys)
    reference_high, reference_low = split(reference_gate(gate, lifespans)[..., first_query:])
    reference_high, reference_low = realize(reference_high), _realize(reference_low)
    high, low = split(gate)
    high, low = packed(high), None if low is None else realize(packed(low))
    route = gate_gradient.chosen_route(needs_gradient and high.requires_grad, score_mod is not None)
    added = realize(high if route == "atomics" else high.detach())
    if score_mod is not None:
        key_position = per_head(order)
        query_position = realize(torch.arange(first_query, keys, device=query.device))

    # Each captured tensor is indexed once and flat: FlexAttention differentiates no other form.
    def packed_score_mod(score: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        i = row // group
        if score_mod is not None:
            score = score_mod(score, b, h * group + row % group, query_position[i], key_position[b, h, column])
        difference = added[b, h, column] - reference_high[b, h, i]
        if low is not None and reference_low is not None:
            difference = difference + (low[b, h, column] - reference_low[b, h, i])
        return score + difference

    def packed_mask_mod(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        i = row // group
        return (i >= birth[b, h, column]) & (i < death[b, h, column])

    block_mask = block_mask_from(metadata, (queries * group, keys), block_size, packed_mask_mod)
    rows = realize(rows)  # a buffer: the C++ lowering takes no view of a computed tensor
    output = gate_gradient.attend(
        route, rows, packed_key, packed_value, high, packed_score_mod, block_mask, scale, kernel_options
    )
    return output.unflatten(2, (queries, group)).transpose(2, 3).flatten(1, 2)


# One compiled function for eager callers.  fullgraph: past the limit it raises, and is never eager FlexAttention instead.
compiled_flex_attend = torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT)(
    torch.compile(flex_attend, fullgraph=True)
)


def _permutation(order: Tensor, needs_gradient: bool) -> Callable[[Tensor], Tensor]:
    """Keys [B, H, K, ...] -> the same in this order."""
    if not needs_gradient:
        return lambda tensor: along_keys(tensor, order)
    positions = torch.arange(order.shape[-1], device=order.device, dtype=torch.int32).expand_as(order)
    inverse = scattered(positions, order).long()
    return lambda tensor: _Permuted.apply(tensor, order, inverse)


class _Permuted(torch.autograd.Function):
    """Keys [B, H, K, ...] in another order.  The gradient is the inverse permutation.

    `gather` alone does not know that `order` holds every key once: its gradient would add each element of dK and dV to
    zeros with an atomic operation.
    """

    @staticmethod
    def forward(ctx, tensor: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return along_keys(tensor, order)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return along_keys(gradient, ctx.saved_tensors[0]), None, None


def _realize(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else realize(tensor)


def _empty_schedule(
    birth: Tensor, death: Tensor, queries: int, group: int, unit: int, rows: int, columns: int, transposed: bool
) -> list[Tensor]:
    most = _most_visited(birth, group, unit, rows, columns)
    metadata = block_metadata(birth, death, queries, group, rows, columns, transposed, most)
    return [
        torch.empty(birth.shape, dtype=torch.int64, device=birth.device),
        *map(torch.empty_like, [birth, death, *metadata]),
    ]


def _most_visited(birth: Tensor, group: int, unit: int, rows: int, columns: int) -> int | None:
    """How long the index tensors need be; None for the C++ lowering, which wants an entry for every key block."""
    if birth.device.type == "cpu":
        return None
    positions = (rows + group - 2) // group + 1  # that a block of rows reaches into
    return most_visited(birth.shape[-1], unit, positions, columns)


@opaque_on_cpu("flex_schedule", _empty_schedule)
def _schedule(
    birth: Tensor, death: Tensor, queries: int, group: int, unit: int, rows: int, columns: int, transposed: bool
) -> list[Tensor]:
    """Order of the keys, their birth and death in that order as query numbers, and the block metadata.

    Query numbers (0 = the first query), so that the mask_mod captures no symbolic length: the C++ lowering takes none.
    """
    first_query = birth.shape[-1] - queries
    order = pack(Lifespans(birth, death), unit, first_query=first_query)
    birth, death = birth.gather(-1, order), death.gather(-1, order)
    most = _most_visited(birth, group, unit, rows, columns)
    metadata = block_metadata(birth, death, queries, group, rows, columns, transposed, most)
    return [order, birth - first_query, death - first_query, *metadata]
