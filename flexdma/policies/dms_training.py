"""Dynamic Memory Sparsification (DMS, arXiv 2506.05345), training: keys that would be evicted lose weight after a window."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from flexdma import checks
from flexdma.lifespans import Lifespans
from flexdma.policies.dms import after_window


def dms_training_lifespans(
    alpha: Tensor,
    window_size: int | Sequence[int],
    *,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> tuple[tuple[Lifespans, Lifespans], tuple[None, Tensor]]:
    """Two intervals per key: bias 0 for `window_size` queries, then log sigmoid(-alpha) to the end of its document.

    alpha: [B, H, K], any float dtype: the logit of evicting each key, after noise and temperature (Gumbel-sigmoid) in
        training.  The bias is the logarithm of the probability to keep the key.
    window_size: one int, or H ints.  A query sees the last `window_size` keys, its own included, with bias 0.
        NVIDIA's `dms_window_size` does not count the query's own key: it is window_size - 1.  In NVIDIA's code the logit
        of key j comes from token j + 1; shift alpha by one for a model of theirs.
    key_padding_mask, document_ids: as in `causal_top_w`.

        alpha = [a b c d], window_size = 2          query 0: 0
                                                    query 1: 0     0
        birth, death = [0 1 2 3], [2 3 4 4]         query 2: -s(a) 0     0            s(x) = log(1 + exp(x)),
                       [2 3 4 4], [4 4 4 4]         query 3: -s(a) -s(b) 0  0         log sigmoid(-x) = -s(x)

    Returns (lifespans, biases) for `lifespan_attention(query, key, value, lifespans, bias=biases)`: two Lifespans [B, H, K],
    and None and the bias [B, H, K], in float32 or float64.  Its gradient reaches alpha.  A query sees all earlier keys of its
    document, so attention takes O(Q K) time; nothing of that size is stored.
    Raises ValueError or TypeError naming the argument.  O(K).
    """
    checks.selected_keys(alpha, key_padding_mask, document_ids, "alpha")
    near, whole = (
        after_window(torch.full_like(alpha, ends, dtype=torch.bool), window_size, key_padding_mask, document_ids)
        for ends in (True, False)
    )
    bias = logsigmoid(-alpha.to(torch.promote_types(alpha.dtype, torch.float32)))
    return (near, Lifespans(near.death, whole.death)), (None, bias)
