"""The attention layers of a converted model and their windows."""

from typing import Any

from torch import nn


def converted_layers(model: nn.Module) -> list[Any]:
    """The layers with gates, in order of `layer_idx`.  Raises TypeError where there are none."""
    layers = [module for module in model.modules() if hasattr(module, "value_gate")]
    if not layers:
        raise TypeError(f"model: expected one converted by convert_to_dma, got {type(model).__name__} without gates")
    return sorted(layers, key=lambda layer: layer.layer_idx)


def windows_per_head(layer: Any) -> list[int]:
    """The window of each KV head of a layer with gates.  Raises ValueError where it has none."""
    window = layer.dynamic_mask_options["window_size"]
    if window is None:
        kind = layer.dynamic_mask_options["selection"]
        raise ValueError(f"model: expected layers with windows, got selection={kind!r} with window_size=None")
    return list(window) if isinstance(window, tuple) else [window] * layer.value_gate.num_kv_heads
