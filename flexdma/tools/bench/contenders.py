"""Whole calls, side by side: attention to everything, flexdma, and other ways to the same or similar result.

Every flexdma and every dense-mask call builds its mask inside the timer.  FlexAttention's causal mask is made outside: it
does not depend on the gates, so a model makes it once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from flexdma import causal_top_w, dynamic_mask_attention
from flexdma.block_masks import dynamic_block_mask
from flexdma.lifespans import Lifespans
from flexdma.lowerings.flex import default_block_size
from flexdma.lowerings.fused import block_size_for
from flexdma.lowerings.gather import BLOCK_SIZE as QUERY_BLOCK
from flexdma.opaque import realize
from flexdma.packing.block_index import block_index
from flexdma.packing.schedule import schedule
from flexdma.rounding import ceil_div
from flexdma.score_mods import gate_score_mod
from flexdma.tools.bench.dense_mask import check_fits, dense_mask_attention
from flexdma.tools.bench.peers import peers
from flexdma.tools.bench.shapes import Shape
from flexdma.tools.bench.timing import backward_of

CAUSAL, EAGER, COMPILED = "SDPA causal", "flexdma (default, eager call)", "flexdma flex, compiled"
COMPILED_GATHER = "flexdma gather, compiled"
FLEX_CAUSAL, NATURAL = "FlexAttention causal", "FlexAttention, same mask in natural order"
DENSE = "dense top-w mask + SDPA (as Hugging Face Doge)"
# What attends to all earlier keys: its useful work is N (N + 1) / 2 pairs.
TO_EVERYTHING = (CAUSAL, FLEX_CAUSAL)
FLEX_TILE = 128  # FlexAttention's default mask block

Compile = Callable[..., Callable[..., Tensor]]
compile_whole: Compile = partial(torch.compile, fullgraph=True, dynamic=False)


def contenders(
    shape: Shape, tensors: list[Tensor], compiler: Compile = compile_whole
) -> dict[str, Callable[[], object]]:
    """Name -> call.  SDPA, by each backend that the device has, comes first: the others are compared with its fastest."""
    query, key, value, _gate = tensors
    cuda = query.is_cuda
    options: dict[str, Any] = {"window_size": shape.window}
    calls: dict[str, Callable[[], Tensor]] = dict(sdpa_causal(query, key, value))
    compiled = compiler(dynamic_mask_attention)
    # On CUDA the default is flex, compiled too, and would only be compiled again.
    if not cuda:
        calls[EAGER] = partial(dynamic_mask_attention, *tensors, **options)
    # Without a gradient one batched expression holds all N (w + block) scores at once: no way to run long inference.
    if not cuda and shape.backward:
        calls[COMPILED_GATHER] = partial(compiled, *tensors, **options, lowering="gather")
    if cuda or not shape.backward:  # torch has no backward of FlexAttention on a CPU
        calls[COMPILED] = partial(compiled, *tensors, **options, lowering="flex")
        if shape.flex or shape.every:
            calls[FLEX_CAUSAL] = flex_causal(query, key, value, compiler)
        if shape.every:
            calls[NATURAL] = partial(_natural_order(shape, compiler, cuda), *tensors)
    if shape.every:
        calls[DENSE] = partial(_dense, shape, tensors)
        calls |= peers(shape, tensors)
    return {name: partial(_step, call, tensors, shape.backward) for name, call in calls.items()}


def sdpa_causal(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Causal attention to everything: PyTorch's choice on a CPU, each fused backend on CUDA."""
    attend = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    if not query.is_cuda:
        return {CAUSAL: partial(attend, query, key, value)}
    group = query.shape[1] // key.shape[1]

    def by(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            if backend == SDPBackend.EFFICIENT_ATTENTION:  # takes no grouped heads
                keys, values = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
                return scaled_dot_product_attention(query, keys, values, is_causal=True)
            return attend(query, key, value)

    return {
        f"{CAUSAL}, flash": partial(by, SDPBackend.FLASH_ATTENTION),
        f"{CAUSAL}, cudnn": partial(by, SDPBackend.CUDNN_ATTENTION),
        f"{CAUSAL}, efficient": partial(by, SDPBackend.EFFICIENT_ATTENTION),
    }


def flex_causal(query: Tensor, key: Tensor, value: Tensor, compiler: Compile) -> Callable[[], Tensor]:
    """FlexAttention with a causal BlockMask, made by counting: `create_block_mask` would hold an N x N tensor."""
    length = key.shape[2]
    birth = torch.arange(length, dtype=torch.int32, device=key.device).view(1, 1, -1)
    tile = (FLEX_TILE, FLEX_TILE)
    index = block_index(birth, torch.full_like(birth, length), queries=length, block_size=tile, transposed=True)
    mask = index.block_mask((length, length), tile, lambda b, h, i, j: i >= j)
    return partial(compiler(flex_attention), query, key, value, block_mask=mask, enable_gqa=True)


def _natural_order(shape: Shape, compiler: Compile, cuda: bool) -> Callable[..., Tensor]:
    """The same mask and gates without packing, as the recipes offer it for plain FlexAttention."""

    def attend(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, block_mask: BlockMask | None = None) -> Tensor:
        heads = {"num_query_heads": shape.query_heads}
        mask = dynamic_block_mask(gate, shape.window, **heads) if block_mask is None else block_mask
        score_mod = gate_score_mod(realize(gate), **heads)
        return flex_attention(query, key, value, score_mod=score_mod, block_mask=mask, enable_gqa=True)

    compiled = compiler(attend)

    def with_mask_from_outside(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        mask = dynamic_block_mask(gate, shape.window, num_query_heads=shape.query_heads)
        return compiled(query, key, value, gate, block_mask=mask)

    # Inductor's C++ kernel captures graph inputs alone; on CUDA the mask is built by the same graph.
    return compiled if cuda else with_mask_from_outside


def _dense(shape: Shape, tensors: list[Tensor]) -> Tensor:
    query, key, value, gate = tensors
    check_fits(shape, query.element_size(), query.device.type)
    return dense_mask_attention(query, key, value, gate, shape.window)


def _step(call: Callable[[], Tensor], tensors: list[Tensor], backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        output = call()
        if backward:
            backward_of(output, tensors)


@torch.no_grad()
def visited_over_ideal(shape: Shape, gate: Tensor) -> dict[str, float]:
    """Contender -> pairs that it computes over pairs that the mask shows.  `gate`: [1, Hkv, N]."""
    alive = causal_top_w(gate, shape.window)
    group = shape.query_heads // shape.heads
    rows, columns = default_block_size(gate.device.type)
    shown = (alive.death - alive.birth).sum().item() * group

    sizes: dict[str, Any] = {
        "queries": shape.length,
        "group": group,
        "capacity": shape.window,
        "block_size": (rows, columns),
    }
    packed = schedule(alive, **sizes, transposed=False)[1]
    natural = block_index(*alive, queries=shape.length, block_size=(FLEX_TILE, FLEX_TILE))
    visited, in_order = (index.visited().sum().item() for index in (packed, natural))
    blocks = ceil_div(shape.length, QUERY_BLOCK)
    slots = min(shape.window, shape.length) + QUERY_BLOCK
    gathered = shape.query_heads * blocks * QUERY_BLOCK * slots / shown
    fused_block = block_size_for(alive, shape.length, shape.window)
    everything = shape.query_heads * shape.length * (shape.length + 1) / 2 / shown
    return {
        CAUSAL: everything,
        FLEX_CAUSAL: everything,
        # Inference gathers each block's living keys and no more.
        EAGER: gathered if shape.backward else _living_pairs(alive, fused_block) * group / shown,
        COMPILED_GATHER: gathered,
        COMPILED: visited * rows * columns / shown,
        NATURAL: in_order * FLEX_TILE * FLEX_TILE * group / shown,
        DENSE: shape.query_heads * shape.length**2 / shown,
    }


def _living_pairs(alive: Lifespans, block: int) -> int:
    """Queries of each block times the keys alive in it, per query head of a group."""
    birth, death = alive
    length = birth.shape[-1]
    lives = death > birth
    born = lives.cumsum(-1)  # keys are in their natural order
    gone = torch.zeros(*birth.shape[:-1], length + 1, dtype=torch.int64, device=birth.device)
    gone = gone.scatter_add_(-1, death.long(), lives.long()).cumsum(-1)
    starts = torch.arange(0, length, block, device=birth.device)
    last = (starts + block).clamp(max=length) - 1
    return int(((born[..., last] - gone[..., starts]) * block).sum())
