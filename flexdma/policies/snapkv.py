"""SnapKV (arXiv 2404.14469): of a prompt, decoding keeps the keys that the prompt's last queries attend to."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from flexdma import checks
from flexdma.lifespans import Lifespans
from flexdma.lifespans.order_statistics import scattered
from flexdma.lifespans.ranking import by_rank
from flexdma.lifespans.selection import on_device
from flexdma.lifespans.visible import causal_lifespans
from flexdma.policies.observed_mass import observed_mass
from flexdma.policies.within_documents import within_documents

POOLINGS: dict[str, Callable[..., Tensor]] = {"avg": avg_pool1d, "max": max_pool1d}


def snapkv_lifespans(
    query: Tensor,
    key: Tensor,
    capacity: int | Sequence[int],
    *,
    prompt_length: int | None = None,
    observed: int = 32,
    kernel_size: int = 5,
    pooling: str = "avg",
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    lowering: str | None = None,
) -> Lifespans:
    """The prompt attends to all of itself; when it ends, each head keeps `capacity` of its keys.

    Kept are the last `observed` keys, and of the others those with the largest score: the attention that they receive from
    the last `observed` queries, pooled over `kernel_size` neighbouring keys (zeros beyond the ends).  Keys after the prompt
    stay.

    query: [B, Hq, Q, D], the last Q of the K positions, with the observed ones; key: [B, Hkv, K, D].
    capacity: one int, or Hkv ints, above `observed`: SnapKV's max_capacity_prompt.  All stay where the prompt has no more.
    prompt_length: P, the first position of decoding.  None = K.
    observed, kernel_size, pooling: SnapKV's window_size, an odd number of keys, and "avg" or "max".
    scale: of the logits; None = 1 / sqrt(D).
    key_padding_mask: [B, K] bool, True = real token.  A padded key is never visible and a padded query is not observed.
    lowering: of `attention_mass`.

    The attention of the query heads of a KV head is added; the original keeps other keys for each query head.  Of equal
    scores the newer key stays; NaN ranks highest.

    Returns Lifespans [B, Hkv, K].
    Raises ValueError or TypeError naming the argument.  Time and memory of `attention_mass` for `observed` queries.
    """
    batch, _, queries, _ = checks.tensor("query", query, ("B", "Hq", "Q", "D")).shape
    checks.attention_arguments(query, key, key)
    heads, keys = key.shape[1:3]
    prompt = keys if prompt_length is None else prompt_length
    for name, number in (("prompt_length", prompt), ("observed", observed), ("kernel_size", kernel_size)):
        checks.positive_int(name, number)
    if prompt > keys:
        raise ValueError(f"prompt_length: expected at most K = {keys}, got {prompt}")
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
    checks.one_of("pooling", pooling, tuple(POOLINGS))
    kept = checks.per_head("capacity", capacity, heads, observed + 1)
    checks.masks(batch, keys, key, key_padding_mask, None)
    death = torch.full((batch, heads, keys), keys, dtype=torch.int64, device=key.device)
    if prompt <= min(kept):
        return within_documents(death, key_padding_mask, None)
    first = prompt - observed
    if first < keys - queries:
        raise ValueError(f"query: expected the positions from {first} on, which are observed, got the last {queries}")
    seen = causal_lifespans(key[:, :, :prompt])
    if key_padding_mask is not None:
        seen = within_documents(seen.death.long(), key_padding_mask[:, :prompt], None)
    real = None if key_padding_mask is None else key_padding_mask[:, :prompt]
    offset = queries - keys
    mass = observed_mass(query[:, :, first + offset : prompt + offset], key[:, :, :prompt], seen, real, scale, lowering)
    score = POOLINGS[pooling](mass[..., :first], kernel_size, stride=1, padding=kernel_size // 2)
    if real is not None:
        score = score.masked_fill(~real[:, None, :first], -torch.inf)
    ranked = by_rank(score)
    rank = scattered(torch.arange(first, dtype=torch.int32, device=key.device).expand_as(ranked), ranked)
    # A prompt of at most `capacity` keys loses none: fewer than capacity - observed keys are ranked.
    leaves = pad(rank >= on_device(kept, key.device) - observed, (0, keys - first), value=False)
    return within_documents(torch.where(leaves, prompt, death), key_padding_mask, None)
