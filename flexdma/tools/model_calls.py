"""Calls of a model as in training: forward, then gradients of all tensors that require one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def tensors_of(fn_or_module: Callable | nn.Module, *arguments: Any) -> list[Tensor]:
    """The tensors among the arguments, in any nesting, and the parameters of a module."""
    leaves = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    return leaves + (list(fn_or_module.parameters()) if isinstance(fn_or_module, nn.Module) else [])


def call_with_gradients(compiled: Callable, fn_or_module: Callable | nn.Module, args: Any, kwargs: dict) -> None:
    """Call `compiled`, the compiled `fn_or_module`, then its backward if it has one, without changing any .grad."""
    outputs = [out for out in tree_leaves(compiled(*args, **kwargs)) if isinstance(out, Tensor) and out.requires_grad]
    wanted = [tensor for tensor in tensors_of(fn_or_module, args, kwargs) if tensor.requires_grad]
    if outputs and wanted:
        torch.autograd.grad(outputs, wanted, [torch.ones_like(output) for output in outputs], allow_unused=True)
