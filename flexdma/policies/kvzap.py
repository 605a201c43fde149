"""KVzap (arXiv 2601.07891): a key whose predicted score is below a threshold leaves after a window."""

from collections.abc import Sequence

from torch import Tensor

from flexdma import checks
from flexdma.lifespans import Lifespans
from flexdma.policies.dms import after_window


def kvzap_lifespans(
    score: Tensor,
    threshold: float,
    window_size: int | Sequence[int] = 128,
    *,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Lifespans:
    """A key with score < threshold dies after `window_size` queries; the others live to the end of their document.

    score: [B, H, K], any float dtype: the importance that KVzap's model predicts from hidden states.  NaN is not below.
    threshold: tau, any number that is not NaN.  kvpress uses -4 for Qwen3-8B.
    window_size: one int, or H ints.  A query sees the last `window_size` keys, its own included.  The
        `sliding_window_size` of kvpress does not count the query's own key: it is window_size - 1.
    key_padding_mask, document_ids: as in `causal_top_w`.

    Returns Lifespans [B, H, K].  The number of keys that a query sees is not bounded.
    Raises ValueError or TypeError naming the argument.  O(K).
    """
    checks.selected_keys(score, key_padding_mask, document_ids, "score")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or threshold != threshold:
        raise TypeError(f"threshold: expected a number, got {threshold!r}")
    return after_window(score.detach() < threshold, window_size, key_padding_mask, document_ids)
