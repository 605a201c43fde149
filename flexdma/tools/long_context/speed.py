"""Seconds of prefill and of decoding a token, in turns, and the bytes of caches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flexdma.tools.long_context.contenders import FULL, Contender
from flexdma.tools.timing import Turns, interleaved

DECODED = 8  # tokens of one timed run of decoding; the cache grows by them, where it grows


@torch.no_grad()
def speed(
    contenders: Sequence[Contender], ids: Tensor, rounds: int, tick: Callable[[str], None]
) -> Iterator[tuple[str, str, Any]]:
    """Rows (contender, metric, value) for the context ids [1, N].

    cache_bytes: after the prefill.  prefill_seconds: of all N tokens in one pass, with the last one's logits.
    decode_seconds: of one token.  decode_over_full: how many times faster than full attention that is.
    Medians of `rounds` rounds in which the contenders take turns.
    """
    caches: dict[str, Any] = {}

    def prefill(contender: Contender) -> Callable[[], None]:
        def run() -> None:
            caches[contender.name] = contender.prefill(ids)

        return run

    positions = {contender.name: ids.shape[1] for contender in contenders}

    def decode(contender: Contender) -> Callable[[], None]:
        def run() -> None:
            for _ in range(DECODED):
                position = torch.full((1, 1), positions[contender.name], device=ids.device)
                contender.decode(ids[:, -1:], caches[contender.name], position)
                positions[contender.name] += 1

        return run

    turns = Turns(rounds, tick=tick)
    measured = interleaved({one.name: prefill(one) for one in contenders}, turns, memory=False)
    for name, reason in measured.failed.items():
        yield name, "failed", reason
    for name, seconds in measured.seconds.items():
        yield name, "prefill_seconds", seconds
        yield name, "cache_bytes", cache_bytes(caches[name])
    left = [one for one in contenders if one.name in measured.seconds]
    decoded = interleaved({one.name: decode(one) for one in left}, turns, memory=False)
    whole = decoded.seconds.get(FULL)
    for name, seconds in decoded.seconds.items():
        yield name, "decode_seconds", seconds / DECODED
        if whole is not None:
            yield name, "decode_over_full", whole / seconds
    for name, reason in decoded.failed.items():
        yield name, "failed", reason


def cache_bytes(cache: Any) -> int:
    """Bytes of all layers' keys and values, and of what a `DynamicMaskCache` has beside them."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
