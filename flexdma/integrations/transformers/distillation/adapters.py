"""LoRA adapters of peft (arXiv 2106.09685) in the attention layers of a converted model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def add_adapters(model: Any, layers: list[Any], lora: Any, seed: int) -> Any:
    """The model inside a PeftModel, with LoRA adapters; gates become modules to save.  Changes the model in place.

    lora: a rank, for adapters on all projections of the attention layers, or a LoraConfig.
    Raises ImportError without peft, TypeError and ValueError naming what the teacher could not have.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("lora: expected peft to be installed, got none; pip install peft") from error
    if isinstance(lora, bool) or not isinstance(lora, int | peft.LoraConfig):
        raise TypeError(f"lora: expected a rank, a LoraConfig or None, got {lora!r}")
    if isinstance(lora, int):
        if lora < 1:
            raise ValueError(f"lora: expected a rank of at least 1, got {lora}")
        lora = peft.LoraConfig(
            r=lora, lora_alpha=2 * lora, target_modules=_projections(model, layers), task_type="CAUSAL_LM"
        )  # fmt: skip
    if set(lora.modules_to_save or ()) - {"value_gate"} or lora.bias != "none":
        raise ValueError(
            "lora: expected adapters alone, because the teacher has the other weights, got modules_to_save="
            f"{lora.modules_to_save} and bias={lora.bias!r}"
        )
    lora.modules_to_save = ["value_gate"]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type != "cpu"}
    with torch.random.fork_rng(devices, device_type=next(iter(devices)).type if devices else "cuda"):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, lora)
    head = model.get_output_embeddings()
    if isinstance(head, peft.tuners.tuners_utils.BaseTunerLayer):
        adapted.unload()
        vars(model).pop("peft_config", None)
        raise ValueError("lora: expected adapters inside the body of the model, got one on its output embeddings")
    return adapted


@contextmanager
def without_adapters(adapted: Any) -> Iterator[None]:
    """While active, the adapters do nothing.  Afterwards the same parameters as before have gradients."""
    flags = [(parameter, parameter.requires_grad) for parameter in adapted.parameters()]
    try:
        with adapted.disable_adapter():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def merge_adapters(model: Any, adapted: Any) -> None:
    """Add the adapters to the weights of the model, which again has no adapters."""
    adapted.merge_and_unload()
    vars(model).pop("peft_config", None)  # versions of peft differ in whether they leave it


def _projections(model: Any, layers: list[Any]) -> list[str]:
    """The names of the projections in these attention layers, without those of the gates."""
    inside = {id(part) for layer in layers for part in layer.modules()}
    gates = {id(part) for layer in layers for part in layer.value_gate.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in inside - gates
    ]
