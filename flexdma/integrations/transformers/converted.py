"""The attention layers of a converted model and their selections."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from flexdma.integrations.transformers.layer_selections import as_json, layer_selections


def converted_layers(model: nn.Module) -> list[Any]:
    """The layers with gates, in order of `layer_idx`.  Raises TypeError where there are none."""
    layers = [module for module in model.modules() if hasattr(module, "value_gate")]
    if not layers:
        raise TypeError(f"model: expected one converted by convert_to_dma, got {type(model).__name__} without gates")
    return sorted(layers, key=lambda layer: layer.layer_idx)


def set_windows(model: Any, window_size: int | Sequence[int | Sequence[int]]) -> None:
    """Give the layers of a converted model these windows, as `convert_to_dma` takes them, and write them to its config.

    States made before have the windows that they were made with.
    """
    layers = converted_layers(model)
    choice = model.config.flexdma | {"window_size": as_json(window_size)}
    selections = layer_selections(choice, [layer.value_gate.num_kv_heads for layer in layers])
    for layer, selection in zip(layers, selections, strict=True):
        layer.dynamic_mask_options["window_size"] = selection.window_size
    model.config.flexdma = choice
