"""The flex lowering: keys packed by lifespan, then FlexAttention (arXiv 2412.05496), fused by Inductor.

Inductor generates the kernel: Triton on CUDA (forward and backward), C++ on a CPU (inference only, because torch has no
CPU backward).  The query heads of a group are the rows of one head; see `flexdma.packing.rows`.
"""

from collections.abc import Mapping
from operator import index

from torch import Tensor

from flexdma.compiled import compiled
from flexdma.lifespans import Lifespans
from flexdma.lifespans.terms import terms_per_key
from flexdma.lowerings import gate_gradient
from flexdma.lowerings.default_options import default_blocks, device_options
from flexdma.lowerings.flash import is_flash
from flexdma.lowerings.packed_keys import at_places, wide_enough
from flexdma.lowerings.packed_mods import PackedBias, packed_mods
from flexdma.lowerings.reference_gate import biases, split
from flexdma.lowerings.sink_logits import share_of_keys, sink_scores
from flexdma.opaque import realize
from flexdma.packing import Packing
from flexdma.packing.rows import FoldedRows
from flexdma.packing.schedule import schedule
from flexdma.signatures import ScoreMod


def flex_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    lifespans: Lifespans,
    *,
    in_order: bool,
    ranked: bool,
    best_stays: bool,
    capacity: int,
    scale: float,
    score_mod: ScoreMod | None,
    block_size: tuple[int, int] | None,
    kernel_options: Mapping[str, object] | None,
    needs_gradient: bool,
    sink_logits: Tensor | None,
    packed: bool = True,
    one_document: bool = False,
) -> Tensor:
    """softmax(score_mod(q . k * scale) + bias) v over the keys alive at each query; see `lifespan_attention`.

    in_order, ranked, best_stays, packed, one_document: see `flexdma.lowerings.attend`.
    block_size: None = tuned on this device, or the default.
    Call it compiled: uncompiled FlexAttention materialises Q x K scores.
    """
    on_cpu = query.device.type == "cpu"
    if on_cpu:
        # Make sizes constants of the graph: Inductor's C++ kernel confuses symbolic sizes (torch 2.11 to 2.13).
        for tensor in (query, key, value, bias, *lifespans):
            for length in () if tensor is None else tensor.shape:
                index(length)
    value_size = value.shape[-1]
    query, key, value = map(wide_enough, (query, key, value))
    batch, query_heads, queries, size = query.shape
    heads, keys = key.shape[1:3]
    # Groups, blocks and periods are constants of a kernel and cannot be symbols: each value compiles once.
    group = index(query_heads // heads)
    call = (query.device, query.dtype, index(size), group, needs_gradient)
    if block_size is None:
        block_size = default_blocks(query, heads, needs_gradient, kernel_options)
    block_size = (index(block_size[0]), index(block_size[1]))
    capacity = index(capacity)

    rows = FoldedRows.of(queries, group, block_size[0], query.device.type)
    packing, block_index = schedule(
        lifespans, rows=rows, capacity=capacity, block_size=block_size, transposed=needs_gradient,
        any_births=not in_order, ranked=ranked, packed=packed,
    )  # fmt: skip
    terms, birth, death = (realize(tensor.expand(batch, heads, -1)) for tensor in packing[:3])  # [B, Hkv, L]
    packing = packing._replace(order=terms)
    each = terms_per_key(lifespans.birth, key)
    of_keys = packing.of_keys(each)
    order = terms if each == 1 else realize(of_keys.order)  # the key at each place

    def placed(tensor: Tensor, packing: Packing) -> Tensor:
        return at_places(tensor, packing, needs_gradient=needs_gradient)

    packed_key, packed_value = placed(key, of_keys), placed(value, of_keys)  # [B, Hkv, L, D], [B, Hkv, L, Dv]
    folded_query = rows.folded(query, heads)  # [B, Hkv, rows, D]

    has_bias = bias is not None
    bias, reference = biases(
        key, bias, lifespans, queries, best_stays=best_stays, exact=sink_logits is not None, one_document=one_document
    )
    reference_high, reference_low = split(rows.of_rows(reference.detach()))
    reference_high, reference_low = realize(reference_high), _realize(reference_low)
    high, low = split(bias)
    high, low = placed(high, packing), None if low is None else realize(placed(low, packing))
    sizes = (batch, heads, queries, keys)
    route = gate_gradient.chosen_route(
        needs_gradient and high.requires_grad, score_mod is not None, sizes, atomics=not is_flash(kernel_options)
    )
    added = realize(high if route == "atomics" else high.detach())
    packed_bias = None if not has_bias else PackedBias(added, low, reference_high, reference_low)
    packed_score_mod, packed_mask_mod = packed_mods(order, birth, death, packed_bias, score_mod, rows=rows, keys=keys)
    block_mask = block_index.block_mask((rows.total, order.shape[-1]), block_size, packed_mask_mod)
    if on_cpu:
        folded_query = realize(folded_query)  # Inductor's C++ FlexAttention accepts no view of a computed tensor
    output, lse = gate_gradient.attend(
        route, folded_query, packed_key, packed_value, high, packed_score_mod, block_mask, scale, kernel_options,
        () if on_cpu else device_options(*call, score_mod is low is None), return_lse=sink_logits is not None,
    )  # fmt: skip
    output = rows.unfolded(output[..., :value_size])  # [B, Hkv, Q, G, Dv]
    if sink_logits is not None and lse is not None:
        share = share_of_keys(rows.unfolded(lse), sink_scores(sink_logits, reference).float())
        output = (output * share[..., None]).to(query.dtype)
    return output.transpose(2, 3).flatten(1, 2)


compiled_flex_attend = compiled(flex_attend)


def _realize(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else realize(tensor)
