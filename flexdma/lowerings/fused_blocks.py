"""A few blocks of queries, each with its own list of keys, in one call of PyTorch's CPU flash kernel, forward and backward.

This file gathers the keys of the lists; `float_mask.py` computes the kernel's mask.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from flexdma.lowerings.float_mask import seen_bound
from flexdma.lowerings.living_keys import LivingList
from flexdma.stages import staged

# Where a number is added to the rows of the kernel's backward, zeros fill them to a multiple of this.  With vectors of 8
# (AVX2) rows of 65 take 1.26 times as long as rows of 64, and rows of 72 take 1.08; with AVX-512 rows of 72 take 1.1 times as
# long as rows of 65.
ALIGNED = 8 if torch.backends.cpu.get_cpu_capability() == "AVX2" else 1


class AllKeys(NamedTuple):
    """The tensors to gather from, the keys of all heads in one row, and so their terms, P of each key."""

    key: Tensor  # [B Hkv K, D]
    value: Tensor  # [B Hkv K, D]
    bias: Tensor  # [B Hkv P K]
    birth: Tensor | None  # [B Hkv P K], positions in this row; None = a term is born at its own position
    death: Tensor  # [B Hkv P K]
    terms_per_key: int  # P


class Gathered(NamedTuple):
    """The keys of n blocks, C each; shorter lists are filled with keys that no query sees."""

    term: Tensor  # [n, C], in the row of all terms
    position: Tensor  # [n, C], in the row of all keys
    key: Tensor  # [n, C, D]
    value: Tensor  # [n, C, D]
    mask: Tensor  # [n, 1, M, C]: bias - reference where the query sees the key, else -inf
    empty: Tensor | None  # [n]: whether the list has no key; None = each has


@staged("key/value gather")
def gathered(
    reference: Tensor, starts: Tensor, lists: Sequence[LivingList], keys: AllKeys, computed: torch.dtype
) -> Gathered:
    """The keys of n lists, for blocks of M queries, in the dtype `computed`.  At least one list has a key.

    reference [n, M]; starts [n]: positions of the blocks' first queries in the row of all terms.
    """
    index = pad_sequence([each.keys for each in lists], batch_first=True, padding_value=-1)  # [n, C]
    lengths = [len(each.keys) for each in lists]
    absent = index < 0 if min(lengths) < max(lengths) else None
    if absent is not None:
        # Fill short lists with the block's first key: its contents, NaN included, reach the block anyway.
        index = torch.where(absent, index[:, :1].clamp(min=0), index)

    def taken(tensor: Tensor, index: Tensor) -> Tensor:
        return tensor.index_select(0, index.flatten()).unflatten(0, index.shape)

    position = index if keys.terms_per_key == 1 else index.div(keys.terms_per_key, rounding_mode="floor")
    key, value = (taken(tensor, position).to(computed) for tensor in (keys.key, keys.value))
    bias, death = taken(keys.bias, index), taken(keys.death, index)
    birth = index if keys.birth is None else taken(keys.birth, index)
    empty = None
    if absent is not None:
        bias = bias.masked_fill(absent, -math.inf)
        if not min(lengths):
            empty = absent[:, 0]
            key, value = (tensor.masked_fill(empty[:, None, None], 0.0) for tensor in (key, value))
    mask = (bias.unsqueeze(1) - reference.unsqueeze(2)).to(computed)
    some = slice(max(each.partial for each in lists))
    first, last = (bound[:, some] - starts[:, None] for bound in (birth, death))
    partial = mask[..., some]
    torch.minimum(partial, seen_bound(first, last, reference.shape[1], computed), out=partial)
    return Gathered(index, position, key, value, mask.unsqueeze(1), empty)


@staged("attention forward")
def attend_blocks(rows: Tensor, keys: Gathered, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of rows [n, G, M, D] to the keys of their blocks -> [n, G, M, D], and the log-sum-exp of scores [n, G, M].

    A row that sees no key gives 0 and 0.
    """
    group = rows.shape[1]
    rows = rows.to(keys.key.dtype)
    if keys.empty is not None:
        rows = rows.masked_fill(keys.empty[:, None, None, None], 0.0)
    key, value = (tensor.unsqueeze(1).expand(-1, group, -1, -1) for tensor in (keys.key, keys.value))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, key, value, attn_mask=keys.mask, scale=scale
    )


class BlockGradients(NamedTuple):
    """Gradients of rows [n, G, M, D], of the gathered keys and values [n, C, D] and of their biases [n, C]."""

    rows: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


@staged("attention backward")
def block_gradients(
    rows: Tensor,  # [n, G, M, D]
    output: Tensor,  # [n, G, M, D], of `attend_blocks`
    log_sum: Tensor,  # [n, G, M]
    output_gradient: Tensor,  # [n, G, M, D]
    log_sum_gradient: Tensor | None = None,  # [n, G, M]
    *,
    keys: Gathered,
    scale: float,
    needs_bias: bool,
) -> BlockGradients:
    """The backward of `attend_blocks`.

    The kernel's mask has no gradient.  So for the bias each row gets one more column of 1 / scale and each key one of 0: the
    logits are the same, and the gradient of the 0 is the bias's.  The gradient of the scores is
    dS_ij = P_ij (dO_i . v_j - dO_i . o_i + dL_i) with that of the log-sum-exp, dL: one more column of dO with dL_i, of v with
    1, of o with 0.  More columns of 0 fill the kernel's vectors (ALIGNED).
    """
    group, size = rows.shape[1], rows.shape[3]
    columns = 1 + -(size + 1) % ALIGNED if needs_bias or log_sum_gradient is not None else 0

    def widened(tensor: Tensor) -> Tensor:
        wide = tensor.new_empty(*tensor.shape[:-1], size + columns, dtype=keys.key.dtype)
        wide[..., :size] = tensor
        wide[..., size:] = 0.0
        if keys.empty is not None:
            wide.masked_fill_(keys.empty[:, None, None, None], 0.0)
        return wide

    query, out, gradient = widened(rows), widened(output), widened(output_gradient)
    key, value = (pad(tensor, (0, columns)) for tensor in (keys.key, keys.value))
    if needs_bias:
        query[..., size] = 1 / scale
    if log_sum_gradient is not None:
        gradient[..., size] = log_sum_gradient
        value[..., size] = 1.0
    key, value = (tensor.unsqueeze(1).expand(-1, group, -1, -1) for tensor in (key, value))
    of_rows, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        gradient, query, key, value, out, log_sum.to(key.dtype), 0.0, False, attn_mask=keys.mask, scale=scale
    )
    return BlockGradients(
        of_rows[..., :size],
        of_key[..., :size].sum(1),
        of_value[..., :size].sum(1),
        of_key[..., size].sum(1) if needs_bias else None,
    )
