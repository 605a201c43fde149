"""What decides whether a key is needed: the largest probability that a far query gives it in full attention.

One large look back decides, however rare it is, so it is the largest probability and not the mean.
"""

from typing import Any

import torch
from torch import Tensor

from flexdma.integrations.transformers.full_attention import ObservedAttention
from flexdma.lifespans import sliding_window
from flexdma.mass import attention_mass
from flexdma.score_mods import softcap_score_mod

# Added to a probability before its logarithm, so that keys that are never looked at differ little.
FLOOR = 1e-4
# Keys at the start, which the sinks and their neighbours take, are no samples.
FIRST = 8
# Keys with fewer queries in their future than this are no samples either.
LEAST_QUERIES = 16


def future_peaks(seen: ObservedAttention, far: int) -> Tensor:
    """[B, Hkv, N]: the largest probability of each key, over its group and queries at least `far` tokens later."""
    softcap: Any = seen.arguments.get("softcap")
    batch, _, length, _ = seen.key.shape
    any_gate = torch.zeros(batch, 1, length, device=seen.key.device)
    lifespans = sliding_window(any_gate, seen.window) if seen.window < length else None
    return attention_mass(
        seen.query, seen.key, lifespans, reduction="max", ages=[(far, None)], scale=seen.scaling,
        score_mod=None if softcap is None else softcap_score_mod(softcap),
    )[0]  # fmt: skip


def sampled_keys(length: int, far: int) -> slice:
    """The keys of a text of this length whose peaks are samples."""
    return slice(FIRST, length - far - LEAST_QUERIES)
