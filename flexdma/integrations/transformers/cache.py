"""DynamicMaskCache: a transformers cache of one `DynamicMaskState` per layer, as large after a million tokens as after w."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from flexdma.integrations.transformers.cache_layer import DynamicMaskLayer


def given_cache(arguments: Iterable[object]) -> Cache | None:
    """The cache among the arguments of a call, by type: its name is `past_key_values` before transformers 5.24, then `cache`.

    Raises TypeError for two of them, of which the model would ignore one.
    """
    caches = [argument for argument in arguments if isinstance(argument, Cache)]
    if len(caches) > 1:
        raise TypeError(
            f"cache: expected one, got {' and '.join(type(cache).__name__ for cache in caches)}; transformers names the "
            "argument past_key_values before 5.24, and cache from then on"
        )
    return caches[0] if caches else None


class DynamicMaskCache(Cache):
    """A cache for `use_flexdma` and `convert_to_dma` models; `generate` makes one where none is given.

    Layers are added as they come.  Each holds w + sinks + recent keys per KV head, whatever the context.
    """

    layers: list[DynamicMaskLayer]

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=DynamicMaskLayer)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As `DynamicMaskLayer.update`.  RuntimeError where the layers before this one saw other tokens than it will have."""
        # A compiled pass writes to all layers at its end; compared symbolic numbers would break the code of Inductor 2.13.
        if not torch.compiler.is_compiling():
            self._refuse_uneven_layers(layer_idx, key_states.shape[2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _refuse_uneven_layers(self, layer_idx: int, new: int) -> None:
        before = next((layer for layer in reversed(self.layers[:layer_idx]) if layer.is_initialized), None)
        seen = self.layers[layer_idx].tokens if layer_idx < len(self.layers) else 0
        if before is not None and seen != before.tokens - new:
            raise RuntimeError(
                f"cache: expected layer {layer_idx} after {before.tokens - new} tokens, as the layers before it were, got it "
                f"after {seen}: a forward pass did not end, or left layers out; reset() empties the cache"
            )

    def attend(self, layer_idx: int, *tensors: Any, **options: Any) -> Tensor:
        """As `DynamicMaskLayer.attend`, of this layer."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else DynamicMaskLayer()
        return layer.attend(*tensors, **options)

    def activate_past_recording(self) -> None:
        """As `DynamicMaskLayer.activate_past_recording`, for layers to come as well."""
        self.layer_class_to_replicate = _RecordingLayer
        super().activate_past_recording()

    @property
    def nbytes(self) -> int:
        """Bytes of all states."""
        return sum(layer.state.nbytes for layer in self.layers if layer.state is not None)


class _RecordingLayer(DynamicMaskLayer):
    def __init__(self) -> None:
        super().__init__()
        self.record_past = True
