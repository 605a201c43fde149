"""DynamicMaskCache: a transformers cache of one `DynamicMaskState` per layer, as large after a million tokens as after w."""

from typing import Any

from torch import Tensor
from transformers import Cache

from flexdma.integrations.transformers.cache_layer import DynamicMaskLayer


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
        before = next((layer for layer in reversed(self.layers[:layer_idx]) if layer.is_initialized), None)
        if before is not None:
            expected = before.tokens - key_states.shape[2]
            seen = self.layers[layer_idx].tokens if layer_idx < len(self.layers) else 0
            if seen != expected:
                raise RuntimeError(
                    f"cache: expected layer {layer_idx} after {expected} tokens, as the layers before it were, got it after "
                    f"{seen}: a forward pass did not end, or left layers out; reset() empties the cache"
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

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
