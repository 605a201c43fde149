"""MoA, Mixture of Attention Spans (arXiv 2406.14909): windows that grow with the length, by a rule of each head."""

from collections.abc import Sequence

from torch import Tensor

from flexdma import checks
from flexdma.lifespans import Lifespans
from flexdma.policies.streaming_llm import streaming_llm_lifespans


def moa_lifespans(
    key: Tensor,
    alpha: Sequence[float],
    beta: Sequence[float],
    *,
    sinks: int = 64,
    length: int | None = None,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
) -> Lifespans:
    """Head h sees a span of S_h = alpha_h + beta_h N keys: the first `sinks`, and the last S_h - sinks.

    key: [B, Hkv, K, D]; only its shape and device are used.
    alpha, beta: Hkv numbers each; S_h is rounded down.
    sinks: the first keys, which are a part of the span, as in MoA's cache.
    length: N, prompt and new tokens together.  None = K.
    key_padding_mask, document_ids: as in `causal_top_w`; N is the length of the row, not of a document.

    Returns Lifespans [B, Hkv, K].  A query of head h sees at most S_h keys.  MoA's kernel rounds S_h up to blocks of 64.
    Raises ValueError or TypeError naming the argument, and where a span has no key besides its sinks.  O(K).
    """
    heads, keys = checks.tensor("key", key, ("B", "Hkv", "K", "D")).shape[1:3]
    checks.positive_int("sinks", sinks, 0)
    if length is not None:
        checks.positive_int("length", length)
    for name, numbers in (("alpha", alpha), ("beta", beta)):
        if not isinstance(numbers, list | tuple) or len(numbers) != heads:
            raise ValueError(f"{name}: expected one number per key/value head = {heads}, got {numbers!r}")
    spans = [int(a + b * (keys if length is None else length)) for a, b in zip(alpha, beta, strict=True)]
    if min(spans) <= sinks:
        raise ValueError(f"alpha, beta: expected spans above the {sinks} sinks, got {spans}")
    return streaming_llm_lifespans(
        key, [span - sinks for span in spans], sinks=sinks, key_padding_mask=key_padding_mask, document_ids=document_ids
    )
