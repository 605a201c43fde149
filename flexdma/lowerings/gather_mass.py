"""Attention mass by blocks of queries: each block computes its probabilities for the keys it sees, and reduces them.

On every device and dtype.  O(Q (visible keys + block)) time, a sort of the keys for each block under lifespans, and
O(block K) memory.  A block holds the probabilities of whole rows, so one pass over the queries is enough.  A block sees a
prefix of the keys, or, under lifespans, the keys gathered for it: first those that all of its queries see, then the others,
which alone need a mask.
"""

import math
from collections.abc import Callable, Sequence
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexdma.lifespans import Lifespans
from flexdma.lifespans.terms import terms_per_key
from flexdma.lifespans.visible import causal_lifespans, without_hidden
from flexdma.lowerings.reference_gate import biases
from flexdma.mixed_precision import without_autocast
from flexdma.opaque import opaque_on_cpu
from flexdma.packing import along_keys
from flexdma.signatures import ScoreMod, modified_scores
from flexdma.transforms import can_read

# Probabilities of a block (8 MiB of float32), and the bounds of its number of queries; measured on a CPU.
BLOCK_ELEMENTS, SMALLEST_BLOCK, LARGEST_BLOCK = 2**21, 16, 64


def gather_mass(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    lifespans: Lifespans | None,
    *,
    scale: float,
    score_mod: ScoreMod | None,
    reduction: str,
    ages: Sequence[tuple[int, int]] | None,
    block_size: int | None,
) -> Tensor:
    """[B, bands, Hkv, K]; see `flexdma.attention_mass`.  ages: None = one band of all ages."""
    birth, death = (None, None) if lifespans is None else lifespans
    low, high = ([band[side] for band in ages or ()] for side in (0, 1))
    if score_mod is None:
        return _operator(query, key, bias, birth, death, scale, reduction, low, high, block_size)[0]
    return _by_blocks(query, key, bias, birth, death, scale, reduction, low, high, block_size, score_mod)


def _empty_mass(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    birth: Tensor | None,
    death: Tensor | None,
    scale: float,
    reduction: str,
    low: Sequence[int],
    high: Sequence[int],
    block_size: int | None,
) -> list[Tensor]:
    batch, heads, keys = key.shape[:3]
    return [key.new_empty((batch, max(1, len(low)), heads, keys), dtype=_computed(query.dtype))]


@opaque_on_cpu("attention_mass", _empty_mass)
def _operator(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    birth: Tensor | None,
    death: Tensor | None,
    scale: float,
    reduction: str,
    low: Sequence[int],
    high: Sequence[int],
    block_size: int | None,
) -> list[Tensor]:
    return [_by_blocks(query, key, bias, birth, death, scale, reduction, low, high, block_size, None)]


class _Seen(NamedTuple):
    """The keys that a block computes: C of them, of which every query sees the first `always`.

    Of several intervals per key, a key is there once for each that some query sees.
    """

    terms: Tensor | None  # [B, Hkv, C], which of P K terms; None = 0 .. C - 1
    slots: Tensor | None  # [B, Hkv, C], the positions of their keys; None = 0 .. C - 1
    keys: int  # C
    always: int
    visible: Tensor  # [..., M, C - always], whether a query sees each of the others


def _by_blocks(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    birth: Tensor | None,
    death: Tensor | None,
    scale: float,
    reduction: str,
    low: Sequence[int],
    high: Sequence[int],
    block_size: int | None,
    score_mod: ScoreMod | None,
) -> Tensor:
    batch, query_heads, queries, _size = map(index, query.shape)
    heads, keys = map(index, key.shape[1:3])
    each = 1 if birth is None else terms_per_key(birth, key)
    computed = _computed(query.dtype)
    mass = torch.zeros((batch, max(1, len(low)), heads, keys * each), dtype=computed, device=query.device)
    if batch == 0:
        return mass[..., :keys]
    block = block_size or _block_size(batch * query_heads * keys * each)
    reference = None
    if bias is not None:
        lifespans = Lifespans(birth, death) if birth is not None and death is not None else causal_lifespans(key)
        bias, reference = biases(key, bias, lifespans, queries, best_stays=False, exact=False)
        birth, death = without_hidden(lifespans, bias)  # with a reference it would be -inf - x, or NaN
    rows = query.to(computed).unflatten(1, (heads, query_heads // heads)) * scale  # [B, Hkv, G, Q, D]
    key = key.to(computed)
    combined: Callable[[Tensor, Tensor], Tensor] = torch.add if reduction == "sum" else torch.maximum
    for start in range(0, queries, block):
        stop = min(start + block, queries)
        first, last = keys - queries + start, keys - queries + stop
        if birth is None or death is None:
            never = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device).triu(1)
            seen = _Seen(None, None, last, first, ~never)
        else:
            seen = _seen(birth, death, first, last, heads, keys)
        if seen.keys == 0:
            continue
        with without_autocast(query.device):
            added = None
            if bias is not None and reference is not None:
                difference = _at(bias, seen).unsqueeze(-2) - reference[:, :, start:stop, None]
                added = difference.to(computed).unsqueeze(2)
            weights = _probabilities(rows[:, :, :, start:stop], key, seen, added, score_mod, first)
        bands = _reduced(weights, seen, first, reduction, low, high)  # [B, bands, Hkv, C]
        if seen.terms is None:
            mass = combined(mass, pad(bands, (0, keys - seen.keys)))
        else:
            terms = seen.terms.unsqueeze(1).expand_as(bands)
            mass = mass.scatter(-1, terms, combined(mass.gather(-1, terms), bands))
    if each == 1:
        return mass
    mass = mass.unflatten(-1, (keys, each))
    return mass.sum(-1) if reduction == "sum" else mass.amax(-1)


def _probabilities(
    rows: Tensor, key: Tensor, seen: _Seen, added: Tensor | None, score_mod: ScoreMod | None, first: int
) -> Tensor:
    """[B, Hkv, G, M, C]: the softmax of each row's scores; 0 for keys that it does not see, and where it sees none."""
    keys = key[:, :, : seen.keys] if seen.slots is None else along_keys(key, seen.slots)
    group, block = rows.shape[2:4]
    scores = (rows.flatten(2, 3) @ keys.mT).unflatten(2, (group, block))
    if score_mod is not None:
        scores = _modified(scores, seen, first, score_mod)
    if added is not None:
        scores += added
    hidden = ~seen.visible.unsqueeze(-3)
    scores[..., seen.always :].masked_fill_(hidden, -math.inf)
    weights = scores.softmax(-1)
    # A row is NaN as a whole, from a NaN or infinity that it sees, or because it sees no key.
    if not can_read(weights) or bool(weights[..., 0].isnan().any()):
        weights = weights.masked_fill(scores.amax(-1, keepdim=True) == -math.inf, 0.0)
        weights[..., seen.always :].masked_fill_(hidden, 0.0)
    return weights


def _reduced(
    weights: Tensor, seen: _Seen, first: int, reduction: str, low: Sequence[int], high: Sequence[int]
) -> Tensor:
    """[B, Hkv, G, M, C] -> [B, bands, Hkv, C]: the sum or maximum over rows, of ages low <= i - j < high."""

    def over_rows(part: Tensor) -> Tensor:
        part = part.flatten(2, 3)
        return part.sum(2) if reduction == "sum" else part.amax(2)

    def of_ages(part: Tensor, youngest: int, oldest: int, position: Tensor) -> Tensor:
        """position: [..., C], of the keys."""
        i = torch.arange(first, first + part.shape[3], device=part.device)[:, None]
        age = i - position.unsqueeze(-2)
        inside = (age >= youngest) & (age < oldest)
        return over_rows(part.masked_fill(~inside.unsqueeze(-3), 0.0))

    if not low:
        return over_rows(weights).unsqueeze(1)
    if seen.slots is not None:
        bands = [of_ages(weights, *band, seen.slots) for band in zip(low, high, strict=True)]
        return torch.stack(bands, 1)
    position = torch.arange(seen.keys, device=weights.device)
    last = first + weights.shape[3]
    bands = []
    for youngest, oldest in zip(low, high, strict=True):
        # Some query has the age for keys begin .. end, and every query for inner_begin .. inner_end.
        begin, end = (min(max(bound, 0), seen.keys) for bound in (first - oldest + 1, last - youngest))
        inner_begin = min(max(last - oldest, begin), end)
        inner_end = max(min(first - youngest + 1, end), inner_begin)
        parts = [
            of_ages(weights[..., cut], youngest, oldest, position[cut])
            for cut in (slice(begin, inner_begin), slice(inner_end, end))
        ]
        middle = over_rows(weights[..., inner_begin:inner_end])
        bands.append(pad(torch.cat([parts[0], middle, parts[1]], -1), (begin, seen.keys - max(begin, end))))
    return torch.stack(bands, 1)


def _seen(birth: Tensor, death: Tensor, first: int, last: int, heads: int, keys: int) -> _Seen:
    """The keys that queries at positions first .. last - 1 see."""
    batch, _, count = birth.shape
    each = count // keys
    first, last = first + count - keys, last + count - keys  # as positions among the terms
    terms, always = None, 0
    if can_read(birth):
        some = (birth < last) & (death > first) & (death > birth)
        every = some & (birth <= first) & (death >= last)
        count, always = int(some.sum(-1).max()), int(every.sum(-1).min())
        # 0 = seen by all queries, 1 = by some, 2 = by none; slots of one kind stay in order.
        kind = 2 - some.int() - every.int()
        terms = kind.argsort(dim=-1, stable=True)[..., :count]
        birth, death = birth.gather(-1, terms), death.gather(-1, terms)
    elif each > 1:
        terms = torch.arange(count, device=birth.device)
    if terms is not None:
        terms = terms.expand(batch, heads, -1)
    birth, death = (bound[..., None, always:] for bound in (birth, death))
    i = torch.arange(first, last, device=birth.device)[:, None]
    slots = terms if terms is None or each == 1 else terms.div(each, rounding_mode="floor")
    return _Seen(terms, slots, count, always, (birth <= i) & (i < death))


def _at(tensor: Tensor, seen: _Seen) -> Tensor:
    """[B, Hkv, P K] -> [B, Hkv, C]."""
    return tensor[..., : seen.keys] if seen.terms is None else tensor.gather(-1, seen.terms)


def _modified(scores: Tensor, seen: _Seen, first: int, score_mod: ScoreMod) -> Tensor:
    """score_mod on a whole block, with index tensors that broadcast to [B, Hkv, G, M, C]."""
    batch, heads, group, block, _ = scores.shape

    def positions(count: int, dim: int) -> Tensor:
        return torch.arange(count, device=scores.device).view([-1 if d == dim else 1 for d in range(5)])

    column = positions(seen.keys, 4) if seen.slots is None else seen.slots[:, :, None, None]
    head = positions(heads, 1) * group + positions(group, 2)
    modified = modified_scores(score_mod, scores, positions(batch, 0), head, positions(block, 3) + first, column)
    # A tensor of its own, because the mask is written into it.
    return modified.clone(memory_format=torch.contiguous_format)


def _block_size(elements: int) -> int:
    """Queries per block, for this number of elements a query: a power of two."""
    wanted = max(1, BLOCK_ELEMENTS // elements)
    return min(max(1 << (wanted.bit_length() - 1), SMALLEST_BLOCK), LARGEST_BLOCK)


def _computed(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
