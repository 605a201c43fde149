"""Attention mass, sum_i P_ij, by two FlexAttention forwards, without atomics.

The first gives each row's log-sum-exp L_i.  The second has keys as queries and rows as keys, on the transposed mask, with the
scores S_ij - L_i.  Its log-sum-exp over the rows is log sum_i exp(S_ij - L_i) = log sum_i P_ij, the logarithm of the mass.

A band of ages low <= i - j < high cuts each lifespan down to one interval, so a band is one more second pass over other
lifespans, and blocks outside of the band are not visited.
"""

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from flexdma.compiled import compiled
from flexdma.lifespans import Lifespans
from flexdma.lifespans.terms import terms_per_key
from flexdma.lifespans.visible import without_hidden
from flexdma.lowerings.default_options import (
    autotunes,
    default_blocks,
    device_options,
    transposed_options,
    with_defaults,
)
from flexdma.lowerings.gate_gradient import COLUMNS, transposed_block_mask
from flexdma.lowerings.packed_keys import at_places, sum_of_pieces, wide_enough
from flexdma.lowerings.packed_mods import PackedBias, packed_mods
from flexdma.lowerings.reference_gate import biases, split
from flexdma.opaque import realize
from flexdma.packing import Packing
from flexdma.packing.rows import FoldedRows
from flexdma.packing.schedule import schedule
from flexdma.signatures import ScoreMod


class _Pass(NamedTuple):
    """The keys of some lifespans at their places."""

    packing: Packing  # of keys
    keys: Tensor  # [B, Hkv, L, D]
    score_mod: ScoreMod
    block_mask: BlockMask


def flex_mass(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    lifespans: Lifespans,
    *,
    in_order: bool,
    capacity: int,
    scale: float,
    score_mod: ScoreMod | None,
    ages: Sequence[tuple[int, int]] | None,
    block_size: tuple[int, int] | None,
    kernel_options: Mapping[str, object] | None,
) -> Tensor:
    """[B, bands, Hkv, K] float32, the sum over queries; see `flexdma.attention_mass`.

    in_order, capacity: as in `flexdma.lowerings.attend`.  block_size: None = tuned on this device, or the default.
    Call it compiled: uncompiled FlexAttention materialises Q x K scores.
    """
    query, key = wide_enough(query), wide_enough(key)
    batch, query_heads, queries, size = query.shape
    heads, keys = key.shape[1:3]
    group = index(query_heads // heads)
    call = (query.device, query.dtype, index(size), group, False)
    block_size = default_blocks(query, heads, False, kernel_options) if block_size is None else block_size
    block = (index(block_size[0]), index(block_size[1]))
    rows = FoldedRows.of(queries, group, block[0], query.device.type)
    folded_query = rows.folded(query, heads)  # [B, Hkv, rows, D]
    has_bias = bias is not None
    each = terms_per_key(lifespans.birth, key)
    if bias is not None:
        lifespans = without_hidden(lifespans, bias)
    bias, reference = biases(key, bias, lifespans, queries, best_stays=False, exact=False)
    high, low = split(bias)
    subtracted = [None if part is None else realize(part) for part in split(rows.of_rows(reference))]

    def packed(lifespans: Lifespans, most: int, any_births: bool) -> _Pass:
        packing, block_index = schedule(
            lifespans, rows=rows, capacity=index(most), block_size=block, transposed=True, any_births=any_births
        )  # fmt: skip
        terms, birth, death = (realize(tensor.expand(batch, heads, -1)) for tensor in packing[:3])  # [B, Hkv, L]
        packing = packing._replace(order=terms)
        of_keys = packing.of_keys(each)
        order = terms if each == 1 else realize(of_keys.order)  # the key at each place
        added = [
            None if part is None else realize(at_places(part, packing, needs_gradient=False)) for part in (high, low)
        ]
        packed_bias = PackedBias(*added, *subtracted) if has_bias else None  # type: ignore[arg-type]
        packed_score_mod, mask_mod = packed_mods(order, birth, death, packed_bias, score_mod, rows=rows, keys=keys)
        lengths = (rows.total, order.shape[-1])
        return _Pass(
            of_keys,
            at_places(key, of_keys, needs_gradient=False),
            packed_score_mod,
            block_index.block_mask(lengths, block, mask_mod),
        )

    def without_values(tensor: Tensor) -> Tensor:
        """Values of no use, in the size of head that costs least."""
        return tensor.new_zeros((*tensor.shape[:3], COLUMNS))

    whole = packed(lifespans, capacity, not in_order)
    on_cpu = query.device.type == "cpu"
    forward: Any = with_defaults(kernel_options, () if on_cpu else device_options(*call), block)
    _, aux = flex_attention(
        folded_query, whole.keys, without_values(whole.keys), score_mod=whole.score_mod, block_mask=whole.block_mask,
        scale=scale, kernel_options=forward, return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    lse = cast(Tensor, aux.lse)
    lse = realize(torch.where(lse == float("-inf"), 0.0, lse))  # -inf: the row sees no key
    transposed: Any = transposed_options(kernel_options, block, key.dtype, autotunes())

    def summed(keys_of: _Pass) -> Tensor:
        """sum_i P_ij: [B, Hkv, K]."""
        packed_score_mod = keys_of.score_mod

        def log_weight(score: Tensor, b: Tensor, h: Tensor, column: Tensor, row: Tensor) -> Tensor:
            return packed_score_mod(score, b, h, row, column) - lse[b, h, row]

        _, total = flex_attention(
            keys_of.keys, folded_query, without_values(folded_query), score_mod=log_weight,
            block_mask=transposed_block_mask(keys_of.block_mask), scale=scale, kernel_options=transposed,
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        pieces, starts = (
            tensor.expand(batch, heads, -1) for tensor in (keys_of.packing.pieces, keys_of.packing.starts)
        )
        return sum_of_pieces(cast(Tensor, total.lse).exp(), pieces, starts)

    if ages is None:
        return summed(whole).unsqueeze(1)
    # Of each term's key, as a position among the terms: see `flexdma.lifespans.terms`.
    after = (each - 1) * keys
    position = torch.arange(keys, dtype=torch.int32, device=key.device)
    position = position if each == 1 else position.repeat_interleave(each) + after
    bands = []
    for youngest, oldest in ages:
        birth = torch.maximum(lifespans.birth, position + min(youngest, keys))
        death = torch.minimum(lifespans.death, position + oldest) if oldest < keys else lifespans.death
        most = each * (oldest - youngest)
        most = capacity if most > capacity else most
        bands.append(summed(packed(Lifespans(birth, death), most, any_births=True)))
    return torch.stack(bands, 1)


compiled_flex_mass = compiled(flex_mass)
