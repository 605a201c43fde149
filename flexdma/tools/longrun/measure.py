"""Measure prefill in chunks of fixed size, then decoding in turns from an early and from the last state."""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexdma import DynamicMaskAttention, State
from flexdma.tools.machine import synchronise
from flexdma.tools.timing import timed

# Tokens after which peak memory, and decoding, are compared with those at the end.
MEMORY_FROM, DECODE_FROM = 65536, 4096


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run.  hidden_size, heads, kv_heads, head_dim and window are those of the layer."""

    tokens: int
    chunk: int
    decode: int
    window: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    recency: str | None
    seed: int


@dataclass
class Measurements:
    """The measurements.  Marks are (tokens read, seconds so far, peak bytes so far)."""

    marks: list[tuple[int, float, int]] = field(default_factory=list)
    state_bytes: int = 0
    full_cache_bytes: int = 0
    decode_seconds: dict[str, float] = field(default_factory=dict)  # per token, by context

    def numbers(self) -> dict[str, Any]:
        """The measurements for JSON."""
        return asdict(self)

    @property
    def growth(self) -> float | None:
        """Peak memory at the end over that at MEMORY_FROM tokens; None for shorter runs."""
        early = [peak for tokens, _seconds, peak in self.marks if tokens == MEMORY_FROM]
        return self.marks[-1][2] / early[0] if early and self.marks[-1][0] > MEMORY_FROM else None


def make_layer(sizes: Sizes, device: str) -> DynamicMaskAttention:
    """A layer with random weights, A included, because with A = 0 it is a sliding window."""
    torch.manual_seed(sizes.seed)
    layer = DynamicMaskAttention(
        sizes.hidden_size,
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        sizes.window,
        recency=sizes.recency,
        qk_norm=True,
    )
    torch.nn.init.normal_(layer.gate.A)
    return layer.to(device).eval()


@torch.no_grad()
def measure(layer: DynamicMaskAttention, sizes: Sizes, tick: Callable[[str, int], None]) -> Measurements:
    """Prefill and decode; calls `tick(what, done)` after every chunk and token."""
    device = layer.k_proj.weight.device
    generator = torch.Generator(device).manual_seed(sizes.seed)

    def tokens(count: int) -> Tensor:
        return torch.randn(1, count, sizes.hidden_size, device=device, generator=generator)

    measured, state, early, read = Measurements(), layer.empty_state(1), None, 0
    start = time.perf_counter()
    for size in chunk_sizes(sizes.tokens, sizes.chunk):
        _output, state = layer(tokens(size), state=state, return_state=True)
        synchronise()
        read += size
        measured.marks.append((read, time.perf_counter() - start, peak_memory(device)))
        if read == DECODE_FROM:
            early = state.checkpoint()
        tick("prefill", read)
    measured.state_bytes = state.nbytes
    measured.full_cache_bytes = 2 * sizes.kv_heads * sizes.head_dim * state.key.element_size() * sizes.tokens

    states = {f"{sizes.tokens:,}": state} if early is None else {f"{DECODE_FROM:,}": early, f"{sizes.tokens:,}": state}
    measured.decode_seconds = _decode(layer, states, tokens, sizes.decode, tick)
    return measured


def chunk_sizes(tokens: int, chunk: int) -> Iterator[int]:
    """Chunk sizes that add up to `tokens`; shorter ones at the end and before measurements."""
    read = 0
    while read < tokens:
        stops = [stop for stop in (DECODE_FROM, MEMORY_FROM, tokens) if stop > read]
        size = min(chunk, min(stops) - read)
        yield size
        read += size


def _decode(
    layer: DynamicMaskAttention,
    states: dict[str, State],
    tokens: Callable[[int], Tensor],
    count: int,
    tick: Callable[[str, int], None],
) -> dict[str, float]:
    """Median seconds per token from each state; the states take turns token by token."""
    seconds: dict[str, list[float]] = {name: [] for name in states}
    for number in range(count):
        token = tokens(1)
        for name, state in states.items():

            def step(name: str = name, state: State = state, token: Tensor = token) -> None:
                _output, states[name] = layer(token, state=state, return_state=True)

            seconds[name].append(timed(step, host=True))
        tick("decode", number + 1)
    return {name: statistics.median(times) for name, times in seconds.items() if times}


def peak_memory(device: torch.device) -> int:
    """Peak bytes of the process so far, or of PyTorch on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
