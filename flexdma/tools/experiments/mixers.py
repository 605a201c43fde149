"""Mixers: the attentions that are compared, by name, with one interface.

    mixer(hidden states [B, N, width], (cos, sin)) -> [B, N, width]

All own mixers have the projections, query-key normalisation, rotary embedding and grouped heads of `DynamicMaskAttention`.
They differ in the keys that a query sees and in what is added to the logits.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from flexdma import DynamicMaskAttention

EVERY_KEY = 2**30  # a window that no sequence fills


@dataclass(frozen=True)
class ModelSizes:
    """The sizes that all mixers of an experiment share.

    window: w, the keys that a query of a bounded mixer sees, sinks included.
    """

    width: int = 64
    layers: int = 1
    heads: int = 2
    kv_heads: int = 2
    window: int = 16

    @property
    def head_dim(self) -> int:
        """The size of a head."""
        return self.width // self.heads

    @property
    def slopes(self) -> list[float]:
        """Initial slopes in logits per token: heads that fall by one over the window's quarter, and over its fourfold."""
        ratios = torch.linspace(2, -2, self.kv_heads) if self.kv_heads > 1 else torch.zeros(1)
        return (2**ratios / self.window).tolist()


class Mixer(NamedTuple):
    """One row of the comparison.

    make: sizes -> layer.  bounded: whether a query sees at most `window` keys.  sees: in words.  source: the paper.
    """

    make: Callable[[ModelSizes], nn.Module]
    bounded: bool
    sees: str
    source: str


def _layer(sizes: ModelSizes, window: int | None, *, heads: int | None = None, **options: Any) -> DynamicMaskAttention:
    heads = sizes.heads if heads is None else heads
    return DynamicMaskAttention(
        sizes.width, heads, min(sizes.kv_heads, heads), sizes.head_dim, window, qk_norm=True, **options
    )


def _dynamic(**options: Any) -> Callable[[ModelSizes], nn.Module]:
    def make(sizes: ModelSizes) -> nn.Module:
        slopes = sizes.slopes if options.get("recency") == "slope" else None
        return _layer(sizes, sizes.window, slopes=slopes, **options)

    return make


def _window(**options: Any) -> Callable[[ModelSizes], nn.Module]:
    return lambda sizes: _layer(sizes, sizes.window - options.get("sinks", 0), selection="sliding", **options)


def _full(**options: Any) -> Callable[[ModelSizes], nn.Module]:
    return lambda sizes: _layer(sizes, None, selection="full", **options)


def _full_with(recency: str) -> Callable[[ModelSizes], nn.Module]:
    def make(sizes: ModelSizes) -> nn.Module:
        layer = _layer(sizes, EVERY_KEY, recency=recency, slopes=sizes.slopes if recency == "slope" else None)
        layer.gate.A.requires_grad_(False)  # it stays 0: the gate is the recency and a constant, which cancels
        return layer

    return make


MIXERS: Mapping[str, Mixer] = {
    "full": Mixer(_full(), False, "all earlier keys", "arXiv 1706.03762"),
    "full + slope": Mixer(_full_with("slope"), False, "all earlier keys; slope · j", "arXiv 2108.12409"),
    "FoX": Mixer(_full_with("forget"), False, "all earlier keys; forget gates", "arXiv 2503.02130"),
    "gated": Mixer(_full(output_gate=True), False, "all earlier keys; the output gated", "arXiv 2505.06708"),
    "SQA": Mixer(
        lambda sizes: _layer(sizes, None, heads=max(1, sizes.heads // 2), selection="full"), False,
        "all earlier keys, by half of the query heads", "arXiv 2510.01817",
    ),
    "window": Mixer(_window(), True, "the last w keys", "arXiv 1904.10509"),
    "sinks + window": Mixer(_window(sinks=4), True, "the first 4 keys and the last w - 4", "arXiv 2309.17453"),
    "DMA": Mixer(_dynamic(), True, "the w best-gated keys so far", "arXiv 2508.02124"),
    "DMA global": Mixer(
        _dynamic(selection="global"), True, "the w best-gated keys of the whole sequence, later ones included in the choice",
        "arXiv 2508.02124",
    ),
    "DMA + slope": Mixer(_dynamic(recency="slope"), True, "the w best-gated keys so far; slope · j", "this project"),
    "DMA + forget": Mixer(_dynamic(recency="forget"), True, "the w best-gated keys so far; forget gates", "this project"),
}  # fmt: skip


def make_mixer(name: str, sizes: ModelSizes) -> nn.Module:
    """The layer of one of MIXERS.  Raises ValueError for other names."""
    if name not in MIXERS:
        raise ValueError(f"mixer: expected one of {', '.join(MIXERS)}, got {name!r}")
    return MIXERS[name].make(sizes)
