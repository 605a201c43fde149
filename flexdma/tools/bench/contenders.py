"""The contenders of whole calls: full attention, flexdma, and other methods with the same or a similar result.

Every flexdma and every dense-mask call makes its mask inside the timer.  FlexAttention's causal mask is made outside,
because it does not depend on gates and a model makes it once.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flexdma import Lifespans, causal_top_w, lifespan_attention
from flexdma.block_masks import dynamic_block_mask
from flexdma.opaque import realize
from flexdma.packing.block_index import block_index
from flexdma.packing.rows import FoldedRows
from flexdma.score_mods import gate_score_mod
from flexdma.tools.bench.dense_mask import check_fits, dense_mask_attention
from flexdma.tools.bench.peers import peers
from flexdma.tools.shapes import Shape
from flexdma.tools.whole_calls import CAUSAL, COMPILED, Compile, as_steps, compile_whole, whole_calls

FLEX_CAUSAL, NATURAL = "FlexAttention causal", "FlexAttention, same mask in natural order"
ANY_LIFESPANS, LATE = "lifespan_attention, same mask", "lifespan_attention, keys born one query late"
DENSE = "dense top-w mask + SDPA (as Hugging Face Doge)"
# Contenders that attend to all earlier keys: their useful work is N (N + 1) / 2 pairs.
TO_EVERYTHING = (CAUSAL, FLEX_CAUSAL)
FLEX_TILE = 128  # FlexAttention's default mask block


def contenders(shape: Shape, tensors: list[Tensor], compiler: Compile = compile_whole) -> dict[str, Callable[[], None]]:
    """Name -> call, with its backward where the shape has one; `whole_calls` come first."""
    query, key, value, _gate = tensors
    calls = whole_calls(shape, tensors, compiler)
    if COMPILED in calls:  # compiled FlexAttention supports this shape and device
        if shape.flex or shape.every:
            calls[FLEX_CAUSAL] = flex_causal(query, key, value, compiler)
        if shape.every:
            calls[NATURAL] = partial(_natural_order(shape, compiler, query.is_cuda), *tensors)
    if shape.every:
        calls[ANY_LIFESPANS] = partial(_any_lifespans, shape, tensors, 0)
        calls[LATE] = partial(_any_lifespans, shape, tensors, 1)
        calls[DENSE] = partial(_dense, shape, tensors)
        calls |= peers(shape, tensors)
    return as_steps(calls, shape, tensors)


def flex_causal(query: Tensor, key: Tensor, value: Tensor, compiler: Compile) -> Callable[[], Tensor]:
    """FlexAttention with a causal BlockMask from `block_index`, because `create_block_mask` makes an N x N tensor."""
    length = key.shape[2]
    birth = torch.arange(length, dtype=torch.int32, device=key.device).view(1, 1, -1)
    tile = (FLEX_TILE, FLEX_TILE)
    rows = FoldedRows(length, group=1)
    index = block_index(birth, torch.full_like(birth, length), rows=rows, block_size=tile, transposed=True)
    mask = index.block_mask((length, length), tile, lambda b, h, i, j: i >= j)
    return partial(compiler(flex_attention), query, key, value, block_mask=mask, enable_gqa=True)


def _natural_order(shape: Shape, compiler: Compile, cuda: bool) -> Callable[..., Tensor]:
    """The same mask and gates without packing, by the recipes for plain FlexAttention."""

    def attend(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, block_mask: BlockMask | None = None) -> Tensor:
        heads = {"num_query_heads": shape.query_heads}
        mask = dynamic_block_mask(gate, shape.window, **heads) if block_mask is None else block_mask
        score_mod = gate_score_mod(realize(gate), **heads)
        return flex_attention(query, key, value, score_mod=score_mod, block_mask=mask, enable_gqa=True)

    compiled = compiler(attend)

    def with_mask_from_outside(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        mask = dynamic_block_mask(gate, shape.window, num_query_heads=shape.query_heads)
        return compiled(query, key, value, gate, block_mask=mask)

    # Inductor's C++ kernel captures only graph inputs, so the mask is made outside; on CUDA the same graph makes it.
    return compiled if cuda else with_mask_from_outside


def _any_lifespans(shape: Shape, tensors: list[Tensor], late: int) -> Tensor:
    """`lifespan_attention` with births `late` queries after the keys' own positions."""
    query, key, value, gate = tensors
    birth, death = causal_top_w(gate, shape.window)
    return lifespan_attention(query, key, value, Lifespans(birth + late, death), bias=gate)


def _dense(shape: Shape, tensors: list[Tensor]) -> Tensor:
    query, key, value, gate = tensors
    check_fits(shape, query.element_size(), query.device.type)
    return dense_mask_attention(query, key, value, gate, shape.window)
