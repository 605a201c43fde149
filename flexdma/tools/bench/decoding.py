"""Decoding: the time of one token of a layer against a context, by full key/value caches with SDPA and by a state of w keys.

Contexts are filled with random keys, without a forward pass.  The gates of a converted model are equal at its start, so every
token replaces a key.  A model of `calibrate` has random gates, another window in each head, and recent tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexdma import DynamicMaskState, State, ValueGate, dynamic_mask_attention
from flexdma.tools.bench.dense_mask import GIB, free_bytes
from flexdma.tools.timing import Turns, UnavailableError, interleaved

GROWING, STATIC, OURS = "full, DynamicCache", "full, StaticCache", "flexdma"
LAYER_TOKENS = 8  # of one timed run; the growing cache starts each run at N keys
# Windows of heads in the proportions that `calibrate` gives to SmolLM2-135M, with a mean of 128.
WINDOWS = (17, 38, 44, 51, 55, 59, 67, 90, 125, 296, 560)
RECENT = 128
# A calibrated gate is SCALE (a number of standard deviation 1 + SLOPE position).
SCALE, SLOPE = 2.0**-20, 1e-3


@dataclass(frozen=True)
class Decoder:
    """A decoder of SmolLM2-135M's shape with random weights, its window and sinks, and contexts to measure.

    calibrated: with windows, recent tokens and gates as `calibrate` gives, instead of equal windows and gates; models only.
    """

    batch: int
    contexts: tuple[int, ...]
    compiled: bool = False
    calibrated: bool = False
    window: int = 252
    sinks: int = 4
    layers: int = 30
    hidden: int = 576
    intermediate: int = 1536
    vocabulary: int = 49152
    query_heads: int = 9
    heads: int = 3
    size: int = 64

    def __str__(self) -> str:
        return f"B={self.batch}, {'compiled' if self.compiled else 'eager'}{', calibrated' if self.calibrated else ''}"

    @property
    def recent(self) -> int:
        """Number of recent tokens that are always visible."""
        return RECENT if self.calibrated else 0

    def window_size(self, layer: int) -> int | tuple[int, ...]:
        """Of one layer."""
        if not self.calibrated:
            return self.window
        # 7 and the number of windows have no common factor, so neighbouring heads differ.
        return tuple(WINDOWS[(layer * self.heads + head) * 7 % len(WINDOWS)] for head in range(self.heads))

    def keys(self, count: int, dtype: torch.dtype) -> Tensor:
        """Random keys or values [B, Hkv, count, D]."""
        return torch.randn(self.batch, self.heads, count, self.size, dtype=dtype)

    def state(self, context: int, dtype: torch.dtype, layer: int = 0) -> DynamicMaskState:
        """The state of a layer after `context` random keys."""
        key, gate = self.keys(context, dtype), torch.ones(self.batch, self.heads, context)
        if self.calibrated:
            gate = SCALE * (torch.randn(gate.shape).double() + SLOPE * torch.arange(context))
        options: dict[str, Any] = {
            "window_size": self.window_size(layer), "sinks": self.sinks, "recent": self.recent
        }  # fmt: skip
        return dynamic_mask_attention(key[:, :, -1:], key, key, gate, return_state=True, **options)[1]

    def check_fits(self, context: int, layers: int, dtype: torch.dtype) -> None:
        """Raise UnavailableError where a full cache of so many layers, and a copy of one, do not fit in memory."""
        needed = 2 * (layers + 2) * self.batch * self.heads * context * self.size * dtype.itemsize
        if needed > 0.6 * free_bytes("cpu"):
            raise UnavailableError(f"skipped: a full cache of N={context} needs {needed / GIB:.0f} GiB")


def contender(context: int, name: str) -> str:
    """The name in the records of a contender at one context."""
    return f"N={context}: {name}"


def timed_tokens(calls: dict[str, Callable[[], object]], tokens: int, turns: Turns) -> Iterator[tuple[str, str, Any]]:
    """Rows of the contenders, in seconds per token."""
    with torch.no_grad():
        measured = interleaved(calls, turns, memory=False)
    for name, metric, value in measured.rows():
        yield name, metric, value / tokens if metric == "seconds" else value


def layer_calls(decoder: Decoder, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Contender -> a run of LAYER_TOKENS tokens of one layer."""
    calls: dict[str, Callable[[], object]] = {}
    compiler: Callable = torch.compile if decoder.compiled else lambda function: function
    grow, overwrite, step = compiler(_grow), compiler(_overwrite), compiler(_step)
    gate = ValueGate(decoder.heads, decoder.size)
    query = torch.randn(decoder.batch, decoder.query_heads, 1, decoder.size, dtype=dtype)
    key = decoder.keys(1, dtype)
    for context in decoder.contexts:
        for name, run in {
            GROWING: _growing(decoder, context, grow, query, key),
            STATIC: _static(decoder, context, overwrite, query, key),
            OURS: _ours(decoder, context, step, gate, query, key),
        }.items():
            calls[contender(context, name)] = made_at_first_call(run)
    return calls


def made_at_first_call(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
    """A call whose tensors are made by its first run, which is not counted, so that a failure is the contender's."""
    made: list[Callable[[], object]] = []

    def run() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return run


def _full_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """One query, with the query heads of a KV head as its rows, as in transformers."""
    rows = query.reshape(*key.shape[:2], -1, query.shape[3])
    return scaled_dot_product_attention(rows, key, value, attn_mask=mask)


def _grow(query: Tensor, new: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    key, value = torch.cat([key, new], 2), torch.cat([value, new], 2)
    return _full_attention(query, key, value), key, value


def _overwrite(query: Tensor, new: Tensor, key: Tensor, value: Tensor, mask: Tensor, position: Tensor) -> Tensor:
    key.index_copy_(2, position, new)
    value.index_copy_(2, position, new)
    return _full_attention(query, key, value, mask)


def _step(
    query: Tensor, new: Tensor, gate: Callable[[Tensor], Tensor], state: DynamicMaskState
) -> tuple[Tensor, State]:
    return dynamic_mask_attention(
        query, new, new, gate(new), window_size=state.window_size, sinks=state.sinks, state=state, return_state=True,
        donate=True,
    )  # fmt: skip


def _growing(decoder: Decoder, context: int, grow: Callable, query: Tensor, new: Tensor) -> Callable:
    def make() -> Callable[[], object]:
        decoder.check_fits(context, 2, query.dtype)
        base = decoder.keys(context, query.dtype), decoder.keys(context, query.dtype)

        def run() -> None:
            key, value = base
            for _ in range(LAYER_TOKENS):
                _, key, value = grow(query, new, key, value)

        return run

    return make


def _static(decoder: Decoder, context: int, overwrite: Callable, query: Tensor, new: Tensor) -> Callable:
    def make() -> Callable[[], object]:
        decoder.check_fits(context, 2, query.dtype)
        key, value = (decoder.keys(context + LAYER_TOKENS, query.dtype) for _ in range(2))
        positions = torch.arange(context, context + LAYER_TOKENS)
        # A model makes the mask once for all layers.
        masks = (torch.arange(context + LAYER_TOKENS) <= positions[:, None])[:, None, None, None]

        def run() -> None:
            for token in range(LAYER_TOKENS):
                overwrite(query, new, key, value, masks[token], positions[token : token + 1])

        return run

    return make


def _ours(decoder: Decoder, context: int, step: Callable, gate: ValueGate, query: Tensor, new: Tensor) -> Callable:
    def make() -> Callable[[], object]:
        state = [decoder.state(context, query.dtype)]

        def run() -> None:
            for _ in range(LAYER_TOKENS):
                _, state[0] = step(query, new, gate, state[0])

        return run

    return make
