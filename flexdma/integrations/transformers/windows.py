"""The windows of a model that has gates, set between its calls."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from flexdma import checks
from flexdma.integrations.transformers.converted import converted_layers
from flexdma.integrations.transformers.doge import DogeDynamicMaskAttention
from flexdma.integrations.transformers.eligibility import attention_calls, refuse_wider_windows
from flexdma.integrations.transformers.layer_selections import as_json, layer_selections


def set_window_size(model: PreTrainedModel, window_size: int | Sequence[int | Sequence[int]] | None) -> None:
    """Set w of a converted model for its next calls, as for a budget that shrinks in training (`flexdma.annealed_window`).

    model: of `convert_to_dma` or `calibrate`, loaded, or a Doge model after `use_flexdma`.
    window_size: as of `convert_to_dma`; of a Doge model one int.

    `model.config` has it too, so that a saved model has the same windows.  A cache of other windows is refused by its next
    call.  With activation checkpointing, set it after the backward: a layer that runs again has the new window.
    Where windows change, two forward passes of three tokens find the model's own sliding windows, on each rank.
    Raises TypeError or ValueError naming the argument, and changes nothing then.
    """
    doge = [module for module in model.modules() if isinstance(module, DogeDynamicMaskAttention)]
    if doge:
        checks.positive_int("window_size", window_size)
        for layer in doge:
            layer.keep_window_size = window_size
        model.config.keep_window_size = window_size
        return
    layers = converted_layers(model)
    choice = {**model.config.flexdma, "window_size": as_json(window_size)}
    policies = layer_selections(choice, [layer.value_gate.num_kv_heads for layer in layers])
    if [policy.window_size for policy in policies] != [layer.dynamic_mask_options["window_size"] for layer in layers]:
        refuse_wider_windows(attention_calls(model), policies, choice)
        for layer, policy in zip(layers, policies, strict=True):
            layer.dynamic_mask_options["window_size"] = policy.window_size
    model.config.flexdma = choice
