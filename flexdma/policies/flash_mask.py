"""FlashMask (arXiv 2410.01359): a mask as intervals of masked rows per column; its complement is lifespans."""

import torch
from torch import Tensor

from flexdma import checks
from flexdma.lifespans import Lifespans
from flexdma.opaque import apart

# causal -> the numbers of columns that Paddle takes.
COLUMNS = {True: (1, 2), False: (2, 4)}


def flash_mask_lifespans(
    startend_row_indices: Tensor, *, causal: bool, num_queries: int | None = None
) -> tuple[Lifespans, ...]:
    """The keys that queries see under Paddle's `flashmask_attention(..., startend_row_indices, causal=causal)`.

    startend_row_indices: [B, H, K, n], int32 or int64; H is Hkv or 1.  For each key, rows of the score matrix:

        causal   n   rows that are masked                       Lifespans returned
        True     1   r0 <= row                                  1
        True     2   r0 <= row < r1                             2
        False    2   r0 <= row,  row < r1                       1
        False    4   r0 <= row < r1,  r2 <= row < r3            3

        With causal=True the rows before a key's own position are masked too.  Numbers outside of 0 .. Q mask what is inside.
    num_queries: Q, the rows of the score matrix; row r is the query at position K - Q + r.  None = K.

        causal, n = 2, K = 4        r0 = [2 4 4 4]              query 0: 0
                                    r1 = [3 4 4 4]              query 1: 0 1
        birth, death = [0 1 2 3], [2 4 4 4]                     query 2:   1 2
                       [3 4 4 4], [4 4 4 4]                     query 3: 0 1 2 3

    Returns a tuple of Lifespans [B, H, K], one for each visible interval that a key can have.  They are disjoint, and empty
    where a key has fewer.  Positions of queries below K - Q are never visible.
    Raises ValueError or TypeError naming the argument.  O(K).
    """
    indices = startend_row_indices
    keys = checks.tensor("startend_row_indices", indices, ("B", "H", "K", "1, 2 or 4")).shape[2]
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"startend_row_indices: expected torch.int32 or torch.int64, got {indices.dtype}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool, got {type(causal).__name__}")
    if indices.shape[3] not in COLUMNS[causal]:
        raise ValueError(
            f"startend_row_indices: expected {' or '.join(map(str, COLUMNS[causal]))} columns with causal={causal}, "
            f"got {indices.shape[3]}"
        )
    if num_queries is not None:
        checks.positive_int("num_queries", num_queries)
        if num_queries > keys:
            raise ValueError(f"num_queries: expected at most K = {keys}, got {num_queries}")
    first = 0 if num_queries is None else keys - num_queries
    rows = [(column.long() + first).clamp(first, keys) for column in indices.unbind(-1)]
    position = torch.arange(keys, device=indices.device)
    begin, end = torch.full_like(rows[0], first), torch.full_like(rows[0], keys)
    if causal:
        begin = torch.maximum(begin, position)
    if len(rows) == 1:
        intervals = [(begin, rows[0])]
    elif causal:
        intervals = [(begin, rows[0]), (torch.maximum(torch.maximum(rows[0], rows[1]), begin), end)]
    elif len(rows) == 2:
        intervals = [(rows[1], rows[0])]
    else:
        # An empty interval of masked rows goes to the end, where it splits nothing.
        masked = [torch.where(start < stop, torch.stack([start, stop]), keys) for start, stop in (rows[:2], rows[2:])]
        lower, upper = (torch.where(masked[0][0] <= masked[1][0], *pair) for pair in (masked, masked[::-1]))
        intervals = [(begin, lower[0]), (lower[1], upper[0]), (torch.maximum(lower[1], upper[1]), end)]
    return tuple(_lifespans(start, stop) for start, stop in intervals)


def _lifespans(birth: Tensor, death: Tensor) -> Lifespans:
    death = torch.maximum(birth, death)
    return Lifespans(*(apart(bound.to(torch.int32).contiguous()) for bound in (birth, death)))
