"""The flex lowering: keys packed by lifespan, then FlexAttention (arXiv 2412.05496), fused by Inductor.

Inductor generates the kernel: Triton on CUDA (forward and backward), C++ on a CPU (inference only, because torch has no
CPU backward).  The query heads of a group are folded into the rows of one head, row i * G + g.  The whole group then shares
one mask and one visit of each key block.
"""

from collections.abc import Mapping
from operator import index

import torch
from torch import Tensor

from flexdma.lifespans import Lifespans
from flexdma.lowerings import gate_gradient
from flexdma.lowerings.default_options import block_size_of, device_options
from flexdma.lowerings.flash import flash_block_size, is_flash
from flexdma.lowerings.packed_keys import at_places
from flexdma.lowerings.reference_gate import biases, split
from flexdma.lowerings.sink_logits import share_of_keys, sink_scores
from flexdma.opaque import realize
from flexdma.packing.schedule import schedule
from flexdma.signatures import ScoreMod

# Compilations for the eager calls of one process: one per dtype, head layout, score_mod and, on a CPU, shape.
RECOMPILE_LIMIT = 64


def flex_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    lifespans: Lifespans,
    *,
    in_order: bool,
    ranked: bool,
    capacity: int,
    scale: float,
    score_mod: ScoreMod | None,
    block_size: tuple[int, int] | None,
    kernel_options: Mapping[str, object] | None,
    needs_gradient: bool,
    sink_logits: Tensor | None,
) -> Tensor:
    """softmax(score_mod(q . k * scale) + bias) v over the keys alive at each query; see `lifespan_attention`.

    in_order, ranked: see `flexdma.lowerings.attend`.  block_size: None = tuned on this device, or the default.
    Call it compiled: uncompiled FlexAttention materialises Q x K scores.
    """
    on_cpu = query.device.type == "cpu"
    if on_cpu:
        # Make sizes constants of the graph: Inductor's C++ kernel confuses symbolic sizes (torch 2.11 to 2.13).
        for tensor in (query, key, value, bias, *lifespans):
            for length in () if tensor is None else tensor.shape:
                index(length)
    batch, query_heads, queries, size = query.shape
    heads, keys = key.shape[1:3]
    # Groups, blocks and periods are constants of a kernel and cannot be symbols: each value compiles once.
    group = index(query_heads // heads)
    call = (query.device, query.dtype, index(size), group, needs_gradient)
    if block_size is None:
        flash = is_flash(kernel_options)
        block_size = flash_block_size(query.device, index(size), needs_gradient) if flash else block_size_of(*call)
    block_size = (index(block_size[0]), index(block_size[1]))
    capacity = index(capacity)
    first_query = keys - queries

    packing, block_index = schedule(
        lifespans, queries=queries, group=group, capacity=capacity, block_size=block_size, transposed=needs_gradient,
        any_births=not in_order,
    )  # fmt: skip
    order, birth, death = (realize(tensor.expand(batch, heads, -1)) for tensor in packing[:3])  # [B, Hkv, L]

    def packed(tensor: Tensor) -> Tensor:
        return at_places(tensor, packing._replace(order=order), needs_gradient=needs_gradient)

    packed_key, packed_value = packed(key), packed(value)  # [B, Hkv, L, D], [B, Hkv, L, Dv]
    rows = query.unflatten(1, (heads, group)).transpose(2, 3)  # [B, Hkv, Q, G, D]
    rows = rows.reshape(batch, heads, queries * group, size)  # [B, Hkv, Q G, D]

    has_bias = bias is not None
    bias, reference = biases(key, bias, lifespans, queries, ranked=ranked, exact=sink_logits is not None)
    reference_high, reference_low = split(reference.detach())
    reference_high, reference_low = realize(reference_high), _realize(reference_low)
    high, low = split(bias)
    high, low = packed(high), None if low is None else realize(packed(low))
    sizes = (batch, heads, queries, keys)
    route = gate_gradient.chosen_route(
        needs_gradient and high.requires_grad, score_mod is not None, sizes, atomics=not is_flash(kernel_options)
    )
    added = realize(high if route == "atomics" else high.detach())
    if score_mod is not None:
        query_position = realize(torch.arange(first_query, keys, device=query.device))

    # Index each captured tensor once, in one step: FlexAttention has derivatives for this form only.
    def packed_score_mod(score: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        i = row // group
        if score_mod is not None:
            score = score_mod(score, b, h * group + row % group, query_position[i], order[b, h, column])
        if has_bias:
            difference = added[b, h, column] - reference_high[b, h, i]
            if low is not None and reference_low is not None:
                difference = difference + (low[b, h, column] - reference_low[b, h, i])
            score = score + difference
        # Inductor's C++ kernel skips a block that begins with NaN as if it were empty.  Infinity becomes NaN in the softmax.
        return torch.where(score.isnan(), float("inf"), score) if on_cpu else score

    def packed_mask_mod(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        i = row // group
        return (i >= birth[b, h, column]) & (i < death[b, h, column])

    block_mask = block_index.block_mask((queries * group, order.shape[-1]), block_size, packed_mask_mod)
    if on_cpu:
        rows = realize(rows)  # Inductor's C++ FlexAttention accepts no view of a computed tensor
    output, lse = gate_gradient.attend(
        route, rows, packed_key, packed_value, high, packed_score_mod, block_mask, scale, kernel_options,
        () if on_cpu else device_options(*call), return_lse=sink_logits is not None,
    )  # fmt: skip
    output = output.unflatten(2, (queries, group))  # [B, Hkv, Q, G, Dv]
    if sink_logits is not None and lse is not None:
        share = share_of_keys(lse.unflatten(2, (queries, group)), sink_scores(sink_logits, reference).float())
        output = (output * share[..., None]).to(query.dtype)
    return output.transpose(2, 3).flatten(1, 2)


# One compiled function for all eager callers.  With fullgraph it raises past the limit instead of running uncompiled.
compiled_flex_attend = torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT)(
    torch.compile(flex_attend, fullgraph=True)
)


def _realize(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else realize(tensor)
