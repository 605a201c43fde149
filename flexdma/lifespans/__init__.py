"""Which key is visible to which query: policies that turn gates into `Lifespans`, one interval per key.

interval.py             Lifespans
ranking.py              the rule by which gates compete
selection.py            Selection: a policy and its sizes as one value
policies.py             causal_top_w, global_top_w, above_threshold, sliding_window
visible.py              how many keys a query sees, and the best of them
order_statistics.py     the k-th smallest of any interval, for every element at once
prefix_statistics.py    the same for prefixes of a permutation, in operations that are fast on a CPU
"""

from flexdma.lifespans.interval import Lifespans
from flexdma.lifespans.policies import above_threshold, causal_top_w, global_top_w, sliding_window
from flexdma.lifespans.ranking import by_rank
from flexdma.lifespans.selection import STATEFUL_SELECTIONS, Selection

__all__ = [
    "STATEFUL_SELECTIONS",
    "Lifespans",
    "Selection",
    "above_threshold",
    "by_rank",
    "causal_top_w",
    "global_top_w",
    "sliding_window",
]
