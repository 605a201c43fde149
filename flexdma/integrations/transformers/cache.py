"""DynamicMaskCache: a transformers cache of one state per layer.  With windows it does not grow with the context."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from flexdma.integrations.transformers.cache_layer import DynamicMaskLayer


def given_cache(arguments: Iterable[object]) -> Cache | None:
    """The cache among the arguments of a call, found by type: transformers 5.24 renamed `past_key_values` to `cache`.

    Raises TypeError for two caches, because the model would ignore one of them.
    """
    caches = [argument for argument in arguments if isinstance(argument, Cache)]
    if len(caches) > 1:
        raise TypeError(
            f"cache: expected one, got {' and '.join(type(cache).__name__ for cache in caches)}; transformers names the "
            "argument past_key_values before 5.24, and cache since then"
        )
    return caches[0] if caches else None


class DynamicMaskCache(Cache):
    """A cache for `use_flexdma` and `convert_to_dma` models; `generate` makes one where none is given.

    Layers are added at their first update.  Each has w + sinks + recent slots per KV head for any context length, where w is
    the widest window of its heads.  Layers without a window have a `GrowingState`, whose slots follow the number of living
    keys; `peak` and `peak_nbytes` report the most so far.
    """

    layers: list[DynamicMaskLayer]

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicMaskLayer)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `DynamicMaskLayer.update`.  Raises RuntimeError where earlier layers have seen another number of tokens."""
        # A compiled pass writes to all layers at its end, and comparing symbolic numbers breaks Inductor's code (torch 2.13).
        if not torch.compiler.is_compiling():
            self._refuse_uneven_layers(layer_idx, key_states.shape[2])
        if layer_idx < len(self.layers) and not self.offloading:
            return self.layers[layer_idx].update(key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _refuse_uneven_layers(self, layer_idx: int, new: int) -> None:
        if 0 < layer_idx < len(self.layers):
            last, layer = self.layers[layer_idx - 1], self.layers[layer_idx]
            if last.is_initialized and layer.tokens == last.tokens - new:
                return
        before = next((layer for layer in reversed(self.layers[:layer_idx]) if layer.is_initialized), None)
        seen = self.layers[layer_idx].tokens if layer_idx < len(self.layers) else 0
        if before is not None and seen != before.tokens - new:
            raise RuntimeError(
                f"cache: expected layer {layer_idx} after {before.tokens - new} tokens, like the layers before it, got it "
                f"after {seen}: a forward pass did not end, or skipped layers; reset() empties the cache"
            )

    def next_layer(self, layer_idx: int) -> DynamicMaskLayer | None:
        """The layer of this number, if it has seen tokens before the last update."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        return layer if layer is not None and layer.tokens else None

    def attend(self, layer_idx: int, *tensors: Any, **options: Any) -> Tensor:
        """As `DynamicMaskLayer.attend`, for this layer."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else DynamicMaskLayer()
        return layer.attend(*tensors, **options)

    def activate_past_recording(self) -> None:
        """As `DynamicMaskLayer.activate_past_recording`, for layers added later too."""
        self.layer_class_to_replicate = _RecordingLayer
        super().activate_past_recording()

    @property
    def nbytes(self) -> int:
        """Bytes of all states, empty slots of narrow heads included."""
        return sum(layer.state.nbytes for layer in self.layers if layer.state is not None)

    @property
    def peak(self) -> int:
        """The largest number of keys that one query has seen, of all layers without a window, heads and sequences."""
        return max((layer.peak for layer in self.layers), default=0)

    @property
    def peak_nbytes(self) -> int:
        """The sum over layers of the most bytes that the state of each has had after a forward pass."""
        return sum(layer.peak_nbytes for layer in self.layers)

    def reserve(self, tokens: int) -> None:
        """As `GrowingState.reserve` for each layer; call it before compiled forward passes of a model without windows."""
        for layer in self.layers:
            layer.reserve(tokens)


class _RecordingLayer(DynamicMaskLayer):
    def __init__(self) -> None:
        super().__init__()
        self.record_past = True
