"""Lifespans: which key is visible to which query, as one interval per key.

A causal running top-w never readmits a key (a later query only adds competitors), so the mask of Dynamic Mask Attention
(arXiv 2508.02124) is exactly  birth[j] <= i < death[j].  Building it costs O(K log K); no Q x K tensor exists at any
point.  Interval masks per key are the format of FlashMask (arXiv 2410.01359); that eviction for ever bounds a cache is
also the ground of SparseK (arXiv 2406.16747).  Everything here composes in that form: a window is death = j + n, a sink
death = the end, a document death <= its end, padding an empty interval.

Shape legend, here and everywhere: B batch, Hq query heads, Hkv key/value heads, G = Hq / Hkv, Q and K sequence lengths,
D head size, w window_size.  H stands for Hkv or 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flexdma import checks
from flexdma.lifespans.order_statistics import kth_smallest, scattered
from flexdma.lifespans.prefix_statistics import kth_smallest_of_prefix
from flexdma.opaque import opaque_on_cpu
from flexdma.stages import staged


class Lifespans(NamedTuple):
    """Key j is visible to the query at position i  <=>  birth[..., j] <= i < death[..., j].

    birth, death: [B, H, K] int32, contiguous.  birth[..., j] = j while the keys are in their natural order; packing moves
    both with the keys.  birth <= death <= K; birth = death: never visible (padding, -inf, outranked on arrival).
    """

    birth: Tensor
    death: Tensor


torch.serialization.add_safe_globals([Lifespans])  # torch.load(weights_only=True) takes no other classes


def causal_top_w(
    gate: Tensor,
    window_size: int | Sequence[int],
    *,
    sinks: int = 0,
    recent: int = 0,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Lifespans:
    """Each query keeps the `window_size` best-gated keys at or before it; of equal gates the newer one.

    gate: [B, H, K], any float dtype; float64 is ranked in float64, the others in float32.  -inf = never visible (not
        even as sink or recent), NaN ranks highest.
    window_size: one int, or H ints (one per head).
    sinks: the first n keys of each document with a gate above -inf stay visible to its end, besides the top-w.
    recent: the last n keys, the query's own included, are always visible, besides the top-w.
    key_padding_mask: [B, K] bool, True = real token; a padded key counts as a gate of -inf.
    document_ids: [B, K] integers; a maximal run of equal ids is a document, and nothing is visible across documents.

        gate = [3, 1, 2, 5], window_size = 2        query 0: 3
                                                    query 1: 3 1
            birth = [0 1 2 3]                       query 2: 3   2
            death = [4 2 3 4]  (4 = to the end)     query 3: 3     5

    Raises ValueError or TypeError naming the argument.  O(K log K) time, O(K) memory.  Section 3 of the paper.
    """
    return _select("causal", gate, window_size, 0.0, sinks, recent, key_padding_mask, document_ids)


def global_top_w(
    gate: Tensor,
    window_size: int | Sequence[int],
    *,
    sinks: int = 0,
    recent: int = 0,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Lifespans:
    """All queries share the `window_size` best-gated keys of the whole (document), still seen causally.

    Arguments as in `causal_top_w`.  The choice looks at later keys: it is not a language model's mask.

        gate = [3, 1, 2, 5], window_size = 2        birth = [0 1 2 3], death = [4 1 2 4]: keys 0 and 3, for all
    """
    return _select("global", gate, window_size, 0.0, sinks, recent, key_padding_mask, document_ids)


def above_threshold(
    gate: Tensor,
    threshold: float = 0.0,
    *,
    window_size: int | Sequence[int] | None = None,
    sinks: int = 0,
    recent: int = 0,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Lifespans:
    """A key is visible to all later queries if its gate is above `threshold` (NaN counts as above).

    With `window_size` the running top-w among the keys above the threshold.  Other arguments as in `causal_top_w`.
    """
    return _select("threshold", gate, window_size, threshold, sinks, recent, key_padding_mask, document_ids)


def sliding_window(
    gate: Tensor,
    window_size: int | Sequence[int],
    *,
    sinks: int = 0,
    recent: int = 0,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Lifespans:
    """The last `window_size` keys whatever their gate (a padded key or a gate of -inf is still never visible).

    Arguments as in `causal_top_w`; `window_size` counts positions, as sliding-window attention does.
    """
    return _select("sliding", gate, window_size, 0.0, sinks, recent, key_padding_mask, document_ids)


def _select(
    selection: str,
    gate: Tensor,
    window_size: int | Sequence[int] | None,
    threshold: float,
    sinks: int,
    recent: int,
    key_padding_mask: Tensor | None,
    document_ids: Tensor | None,
) -> Lifespans:
    windows = checks.selection_arguments(
        gate, window_size, sinks, recent, key_padding_mask, document_ids, needs_window=selection != "threshold"
    )
    gate = gate.detach() if gate.dtype == torch.float64 else gate.detach().float()
    birth, death = _lifespans(gate, selection, windows, threshold, sinks, recent, key_padding_mask, document_ids)
    return Lifespans(birth, death)


def _empty_lifespans(
    gate: Tensor,
    selection: str,
    windows: list[int],
    threshold: float,
    sinks: int,
    recent: int,
    key_padding_mask: Tensor | None,
    document_ids: Tensor | None,
) -> list[Tensor]:
    return [torch.empty(gate.shape, dtype=torch.int32, device=gate.device) for _ in range(2)]


@opaque_on_cpu("lifespans", _empty_lifespans)
def _lifespans(
    gate: Tensor,
    selection: str,
    windows: list[int],
    threshold: float,
    sinks: int,
    recent: int,
    key_padding_mask: Tensor | None,
    document_ids: Tensor | None,
) -> list[Tensor]:
    length = gate.shape[-1]
    positions = torch.arange(length, device=gate.device)
    if document_ids is None:
        start, end = positions.new_zeros(1), positions.new_full((1,), length)
    else:
        start, end = _document_bounds(document_ids)
    real = gate != float("-inf")
    if key_padding_mask is not None:
        real = real & key_padding_mask[:, None]
    chosen = real & ~(gate <= threshold) if selection == "threshold" else real

    if not windows:
        death = end
    elif selection == "sliding":
        death = torch.minimum(positions + per_head(windows, gate), end)
    else:
        ranked = by_rank(gate.masked_fill(~chosen, float("-inf")), start if document_ids is not None else None)
        death = _death_by_rank(ranked, start, end, per_head(windows, gate), shared=selection == "global")
    death = torch.where(chosen, death, positions)
    if recent:
        death = torch.maximum(death, torch.minimum(positions + recent, end))
    if sinks:
        count = real.cumsum(-1)  # 1 at the first real key of the row
        count = count - (count - real.long()).gather(-1, start.expand_as(count))
        death = torch.where(count <= sinks, end, death)
    death = torch.where(real, death, positions)
    return [positions.to(torch.int32).expand(gate.shape), death.to(torch.int32).expand(gate.shape)]


def _document_bounds(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """First position and one past the last of each position's document: two [B, 1, K] from [B, K]."""
    length = document_ids.shape[-1]
    positions = torch.arange(length, device=document_ids.device)
    changed = document_ids[:, 1:] != document_ids[:, :-1]
    first = torch.where(pad(changed, (1, 0), value=True), positions, 0)
    last = torch.where(pad(changed, (0, 1), value=True), positions + 1, length)
    start = first.cummax(-1).values
    end = last.flip(-1).cummin(-1).values.flip(-1)
    return start[:, None], end[:, None]


def per_head(windows: Sequence[int], like: Tensor) -> Tensor:
    """[len(windows), 1] int64, filled on the device: a tensor made from a list would be copied from the host."""
    return torch.cat([torch.full((1, 1), window, device=like.device, dtype=torch.int64) for window in windows])


@staged("ranking")
def by_rank(gate: Tensor, document_start: Tensor | None) -> Tensor:
    """Positions [B, H, K] in order of document, then of rank: larger gates first, of equal gates the newer first."""
    # Stable and on the reversed row, so that ties go to the newer; torch.sort puts NaN first when descending.
    ranked = gate.shape[-1] - 1 - gate.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    if document_start is None:
        return ranked
    # Documents are runs, so ordering by where they start gives each of them one interval of ranks.
    document = document_start.expand_as(ranked).gather(-1, ranked)
    return ranked.gather(-1, document.sort(dim=-1, stable=True).indices)


def _death_by_rank(ranked: Tensor, start: Tensor, end: Tensor, windows: Tensor, shared: bool) -> Tensor:
    """death_j = max(j, the w-th smallest position among the keys of j's document that outrank j); its end if fewer do.

    `shared`: its end for the w best keys of the document, j (never visible) for the others.
    """
    positions = torch.arange(ranked.shape[-1], device=ranked.device)
    rank = scattered(positions.int().expand_as(ranked), ranked).long()
    survives = rank - start < windows
    if shared:
        return torch.where(survives, end, positions)
    if ranked.device.type == "cpu":
        # The keys of earlier documents come first in rank and in position: they can be counted in.
        kth = (start + windows - 1).clamp(max=ranked.shape[-1]).expand_as(rank)
        evicted_at = kth_smallest_of_prefix(ranked, rank, kth)
    else:
        left = start.expand_as(rank).contiguous()
        evicted_at = kth_smallest(ranked.int(), left, rank, (windows - 1).expand_as(rank))
    return torch.where(survives, end, torch.maximum(evicted_at, positions))
