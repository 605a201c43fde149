"""FlashMask's families of masks (arXiv 2410.01359, figure 1), as lifespans and as FlexAttention's mask_mods.

Sizes are those of its benchmark at 8,192 positions, in proportion to the length.  What is random has the seed SEED.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, or_masks

from flexdma import Lifespans
from flexdma.block_masks import document_mask_mod, sink_mask_mod, sliding_window_mask_mod
from flexdma.signatures import MaskMod

POSITIONS = 8192
DOCUMENTS, PREFIXES = (2538, 1742, 3912), (1024, 1742, 512)
ANSWERS = (0.4, 0.15, 0.3, 0.15)  # shares of a document: its question, then answers that do not see each other
UNSEEN = ((1024, 1562), (2358, 4058))  # keys that no query sees before the end of their run
SINKS = 16
# A window of N / 16 keys; caches of N / 2, as FlashMask's, and of N / 16.
WINDOW, CACHES = 16, (2, 16)
SEED = 0


class MaskFamily(NamedTuple):
    """A mask in two forms.

    intervals: one `Lifespans` [1, H, K] for each interval of queries that see a key, disjoint; H = 1, or the KV heads.
    mask_mod: the same mask of positions, as a user of FlexAttention writes it; h is a KV head.
    """

    intervals: tuple[Lifespans, ...]
    mask_mod: MaskMod

    @property
    def heads(self) -> int:
        """H; 1 = all heads share the mask."""
        return self.intervals[0].birth.shape[1]

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees, over the H heads."""
        return sum(int((alive.death - alive.birth).clamp(min=0).sum()) for alive in self.intervals)


def mask_families(length: int, heads: int = 1, device: torch.device | str = "cpu") -> dict[str, MaskFamily]:
    """Name -> mask of `length` positions.  heads: of the random masks, which differ by head."""
    at, window = torch.arange(length, device=device), length // WINDOW
    ids, start, end = _documents(length, device)
    prefix = start + torch.tensor([_scaled(n, length) for n in PREFIXES], device=device)[ids]
    in_window, in_sinks = sliding_window_mask_mod(window), sink_mask_mod(SINKS)
    in_document, same_document = document_mask_mod(ids[None]), _same(ids)
    families = {
        "causal": MaskFamily((_alive(at, length),), _causal),
        "sliding window": MaskFamily((_alive(at, at + window),), in_window),
        "sinks + sliding window": MaskFamily(
            (_alive(at, torch.where(at < SINKS, length, at + window)),), or_masks(in_sinks, in_window)
        ),
        "global + sliding window": _global_window(at, window),
        "causal document": MaskFamily((_alive(at, end),), in_document),
        "document": MaskFamily((_alive(start, end),), same_document),
        "share question": _share_question(at, ids, start, end),
        "causal blockwise": _blockwise(at, ids, end),
        "prefix LM causal": MaskFamily(
            (_alive(torch.where(at < length // 2, 0, at), length),), or_masks(_keys_below(length // 2), _causal)
        ),
        "prefix LM document": MaskFamily(
            (_alive(torch.where(at < prefix, start, at), end),),
            and_masks(same_document, or_masks(_keys_below(prefix), _causal)),
        ),
        "QK-sparse": _qk_sparse(at),
    }
    for part in CACHES:
        families[f"random eviction, cache of N / {part}"] = _random_eviction(at, length // part, heads)
    return families


def _scaled(position: int, length: int) -> int:
    return position * length // POSITIONS


def _alive(birth: Tensor, death: Tensor | int) -> Lifespans:
    """[K] or [H, K] -> [1, H, K] int32, deaths at most K."""
    birth = birth.int().view(1, -1, birth.shape[-1])
    death = torch.as_tensor(death, device=birth.device).clamp(max=birth.shape[-1]).int().expand(birth.shape)
    return Lifespans(birth.contiguous(), death.contiguous())


def _documents(length: int, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
    """The document of each position, and its first position and end: three [K]."""
    ends = torch.tensor([_scaled(end, length) for end in accumulate(DOCUMENTS)], device=device)
    ids = torch.searchsorted(ends, torch.arange(length, device=device), right=True)
    return ids, torch.cat([ends.new_zeros(1), ends])[ids], ends[ids]


def _causal(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return kv_idx <= q_idx


def _same(ids: Tensor) -> MaskMod:
    return lambda b, h, q_idx, kv_idx: ids[q_idx] == ids[kv_idx]


def _keys_below(bound: Tensor | int) -> MaskMod:
    if isinstance(bound, int):
        return lambda b, h, q_idx, kv_idx: kv_idx < bound
    return lambda b, h, q_idx, kv_idx: kv_idx < bound[kv_idx]


def _global_window(at: Tensor, window: int) -> MaskFamily:
    """A window to both sides; the first SINKS positions see all, and all see them."""
    length = len(at)
    first = torch.where(at - window <= SINKS, 0, at - window)
    last = torch.where(at < SINKS, length, at + window + 1)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ((q_idx - kv_idx).abs() <= window) | (q_idx < SINKS) | (kv_idx < SINKS)

    return MaskFamily((_alive(first, last), _alive(torch.zeros_like(at), torch.where(first > 0, SINKS, 0))), mask_mod)


def _share_question(at: Tensor, ids: Tensor, start: Tensor, end: Tensor) -> MaskFamily:
    """Each document is a question and answers; an answer sees the question and itself, causally."""
    shares = torch.tensor(ANSWERS, dtype=torch.float64, device=at.device).cumsum(0)[:-1]
    part = torch.searchsorted(shares, (at - start).double() / (end - start), right=True)  # 0: the question
    part_ids = ids * len(ANSWERS) + part
    part_end = torch.searchsorted(part_ids, part_ids, right=True)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        shared = (part[kv_idx] == 0) | (part[q_idx] == part[kv_idx])
        return (ids[q_idx] == ids[kv_idx]) & shared & (kv_idx <= q_idx)

    return MaskFamily((_alive(at, torch.where(part == 0, end, part_end)),), mask_mod)


def _blockwise(at: Tensor, ids: Tensor, end: Tensor) -> MaskFamily:
    """Causal documents, of which the last sees all others."""
    length, last = len(at), len(DOCUMENTS) - 1
    first_of_last = int((ids < last).sum())
    again = torch.where(ids < last - 1, first_of_last, length)  # the second interval; documents that touch it need one
    death = torch.where(ids == last - 1, length, end)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ((ids[q_idx] == ids[kv_idx]) | (ids[q_idx] == last)) & (kv_idx <= q_idx)

    return MaskFamily((_alive(at, death), _alive(again, length)), mask_mod)


def _qk_sparse(at: Tensor) -> MaskFamily:
    """Causal; keys of UNSEEN are born at the end of their run."""
    birth = at.clone()
    for first, end in ((_scaled(a, len(at)), _scaled(b, len(at))) for a, b in UNSEEN):
        birth[first:end] = end
    return MaskFamily((_alive(birth, len(at)),), lambda b, h, q_idx, kv_idx: q_idx >= birth[kv_idx])


def _random_eviction(at: Tensor, cache: int, heads: int) -> MaskFamily:
    """From query `cache` on each new key takes the place of a random one of the `cache` keys before it."""
    length = len(at)
    generator = torch.Generator().manual_seed(SEED)
    slots = torch.randint(cache, (heads, length - cache), generator=generator)
    slots = torch.cat([torch.arange(cache).expand(heads, -1), slots], -1).to(at.device)
    order = slots.sort(dim=-1, stable=True).indices  # the keys of each slot, one after the other
    held = slots.gather(-1, order)
    leaves = torch.where(held[:, 1:] == held[:, :-1], order[:, 1:], length)
    leaves = torch.cat([leaves, leaves.new_full((heads, 1), length)], -1)
    death = torch.empty_like(leaves).scatter_(-1, order, leaves)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (q_idx < death[h, kv_idx])

    return MaskFamily((_alive(at.expand(heads, -1), death),), mask_mod)
