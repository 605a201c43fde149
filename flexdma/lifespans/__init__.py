"""Which key is visible to which query: policies that turn gates into `Lifespans`, one interval per key.

selections.py           Lifespans; causal_top_w, global_top_w, above_threshold, sliding_window
order_statistics.py     the k-th smallest of any interval, for every element at once
prefix_statistics.py    the same for prefixes of a permutation, as a CPU likes it
"""

from flexdma.lifespans.selections import (
    Lifespans,
    above_threshold,
    by_rank,
    causal_top_w,
    global_top_w,
    per_head,
    sliding_window,
)

__all__ = [
    "Lifespans",
    "above_threshold",
    "by_rank",
    "causal_top_w",
    "global_top_w",
    "per_head",
    "sliding_window",
]
