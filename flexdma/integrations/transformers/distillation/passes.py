"""What is around the forward passes of teacher and student."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """While active, nothing has gradients, and the model is in eval mode, so that it makes no checkpoints of activations."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def recorded(body: Any, layers: list[Any], kept: dict[Any, Any]) -> Iterator[None]:
    """While active, a forward pass puts its layers' values and, under None, the output of its body into `kept`.

    The recomputation of activation checkpointing comes later, when nothing is recorded.
    """

    def keep_output(module: nn.Module, arguments: tuple, output: Any) -> None:
        kept[None] = output

    def keep_value(layer: Any, gate: nn.Module, arguments: tuple) -> None:
        kept[layer] = arguments[0].detach()

    hooks = [body.register_forward_hook(keep_output)]
    hooks += [layer.value_gate.register_forward_pre_hook(partial(keep_value, layer)) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
