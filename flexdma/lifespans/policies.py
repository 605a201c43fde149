"""Policies that turn gates into `Lifespans`, one function each."""

from collections.abc import Sequence

from torch import Tensor

from flexdma import checks
from flexdma.lifespans.interval import Lifespans
from flexdma.lifespans.selection import Selection


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
        even as sink or recent).  NaN ranks highest.
    window_size: one int, or H ints (one per head).
    sinks: the first n keys of each document with a gate above -inf stay visible to its end.  They take no place of the top-w.
    recent: the keys at the last n positions, the query's own included, are visible.  They take no place of the top-w either:
        a key competes for one when it is no longer recent.  So a query sees w + sinks + recent keys once there are so many.
    key_padding_mask: [B, K] bool, True = real token; a padded key counts as a gate of -inf.
    document_ids: [B, K] integers; a maximal run of equal ids is a document, and nothing is visible across documents.

        gate = [3, 1, 2, 5], window_size = 2        query 0: 3
                                                    query 1: 3 1
            birth = [0 1 2 3]                       query 2: 3   2
            death = [4 2 3 4]  (4 = to the end)     query 3: 3     5

        the same gates, window_size = 1, recent = 2     query 0: 3
                                                        query 1: 3 1
            birth = [0 1 2 3]                           query 2: 3 1 2
            death = [4 3 4 4]                           query 3: 3   2 5

    Raises ValueError or TypeError naming the argument.  O(K log K) time, O(K) memory.  Section 3 of the paper.
    """
    return _selection("causal", gate, window_size, sinks, recent).lifespans(
        gate, key_padding_mask=key_padding_mask, document_ids=document_ids
    )


def global_top_w(
    gate: Tensor,
    window_size: int | Sequence[int],
    *,
    sinks: int = 0,
    recent: int = 0,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Lifespans:
    """All queries share the `window_size` best-gated keys of their document, still seen causally.

    Arguments as in `causal_top_w`.  The choice depends on later keys too, so this mask is not for language models.  All keys
    but the sinks compete, also those that are recent for some query, because one choice serves all queries.

        gate = [3, 1, 2, 5], window_size = 2        birth = [0 1 2 3], death = [4 1 2 4]: keys 0 and 3, for all queries
    """
    return _selection("global", gate, window_size, sinks, recent).lifespans(
        gate, key_padding_mask=key_padding_mask, document_ids=document_ids
    )


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
    """A key is visible to all queries from its own position on if its gate is above `threshold` (NaN counts as above).

    With `window_size` each query keeps the running top-w among the keys above the threshold.  Other arguments as in
    `causal_top_w`.  Sinks and recent keys need not be above it; a key that is not dies when it is no longer recent.
    """
    return _selection("threshold", gate, window_size, sinks, recent, threshold).lifespans(
        gate, key_padding_mask=key_padding_mask, document_ids=document_ids
    )


def sliding_window(
    gate: Tensor,
    window_size: int | Sequence[int],
    *,
    sinks: int = 0,
    recent: int = 0,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Lifespans:
    """Each query keeps the last `window_size` keys, whatever their gates.  Padded keys and gates of -inf stay invisible.

    Arguments as in `causal_top_w`.  `window_size` counts positions, as in sliding-window attention.  `recent` adds to it, so
    that the mask is that of `causal_top_w` with equal gates.
    """
    return _selection("sliding", gate, window_size, sinks, recent).lifespans(
        gate, key_padding_mask=key_padding_mask, document_ids=document_ids
    )


def _selection(
    kind: str, gate: Tensor, window_size: int | Sequence[int] | None, sinks: int, recent: int, threshold: float = 0.0
) -> Selection:
    heads = checks.tensor("gate", gate, ("B", "Hkv", "K")).shape[1]
    return Selection.of(kind, window_size, sinks, recent, heads=heads, threshold=threshold)
