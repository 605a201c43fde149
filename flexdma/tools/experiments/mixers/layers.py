"""Mixers that are `DynamicMaskAttention`: all earlier keys, windows, and keys chosen by gates."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flexdma import DynamicMaskAttention
from flexdma.tools.experiments.mixers.mixer import ModelSizes

EVERY_KEY = 2**30  # a window that no sequence fills

Make = Callable[[ModelSizes], nn.Module]


def dynamic(*, recent_part: int = 0, **options: Any) -> Callable[[ModelSizes], DynamicMaskAttention]:
    """The w best-gated keys, of which the last w / recent_part are visible whatever their gates; 0 = none."""

    def make(sizes: ModelSizes) -> DynamicMaskAttention:
        slopes = sizes.slopes if options.get("recency") == "slope" else None
        recent = sizes.window // recent_part if recent_part else 0
        return _layer(sizes, sizes.window - recent, recent=recent, slopes=slopes, **options)

    return make


def threshold(sizes: ModelSizes) -> nn.Module:
    """The keys with a gate above 0, and the query's own.

    Half of the keys are kept before training.
    """
    return _layer(sizes, None, selection="threshold", recent=1)


def window(**options: Any) -> Make:
    """The last keys, w with the sinks."""
    return lambda sizes: _layer(sizes, sizes.window - options.get("sinks", 0), selection="sliding", **options)


def spans(sizes: ModelSizes) -> list[int]:
    """MoA's spans: one per head, from w / 2 to 3 w / 2, w on average."""
    ratios = torch.linspace(0.5, 1.5, sizes.kv_heads) if sizes.kv_heads > 1 else torch.ones(1)
    return (ratios * sizes.window).int().tolist()


def moa(sizes: ModelSizes) -> nn.Module:
    """A span per head, of which w / 8 are sinks."""
    sinks = sizes.window // 8
    return _layer(sizes, [span - sinks for span in spans(sizes)], selection="sliding", sinks=sinks)


def full(**options: Any) -> Make:
    """All earlier keys."""
    return lambda sizes: _layer(sizes, None, selection="full", **options)


def half_of_the_heads(sizes: ModelSizes) -> nn.Module:
    """All earlier keys, by half of the query heads."""
    return _layer(sizes, None, heads=max(1, sizes.heads // 2), selection="full")


def full_with(recency: str) -> Make:
    """All earlier keys, with a recency and no other gate."""

    def make(sizes: ModelSizes) -> nn.Module:
        slopes = sizes.slopes if recency == "slope" else None
        layer = _layer(sizes, EVERY_KEY, form="exp", recency=recency, slopes=slopes)
        layer.gate.A.requires_grad_(False)  # it stays 0: the gate is the recency and a constant, which cancels
        return layer

    return make


def _layer(
    sizes: ModelSizes, window: int | list[int] | None, *, heads: int | None = None, **options: Any
) -> DynamicMaskAttention:
    heads = sizes.heads if heads is None else heads
    return DynamicMaskAttention(
        sizes.width, heads, min(sizes.kv_heads, heads), sizes.head_dim, window, qk_norm=True, **options
    )
