"""Operators that Inductor calls instead of tracing.

Two reasons.  Inductor's C++ FlexAttention accepts a captured tensor only as a buffer, not as an expression
(NoValidChoicesError otherwise), and the Triton one needs a fixed layout.  And on a CPU the integer work of selection and
packing runs as fast in ATen as compiled, so tracing it would only cost compile time.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from flexdma.transforms import is_exporting, is_transformed

Tensors = TypeVar("Tensors", bound=Callable[..., list[Tensor]])


def realize(tensor: Tensor) -> Tensor:
    """A contiguous buffer of these numbers, which every FlexAttention lowering can capture."""
    if not is_fused(tensor) or torch.are_deterministic_algorithms_enabled():
        return _copied(tensor)
    # Inductor keeps the result of index_put in memory, so the kernel that computes the numbers writes them there.  A copy by
    # an operator would be one more launch.  (In deterministic mode it calls ATen's index_put, which sorts.)  The slice makes
    # the result a view: FlexAttention reads a captured tensor as it was before index_put otherwise (torch 2.11 and 2.13).
    size = tensor.numel()
    empty = torch.empty(size + 1, dtype=tensor.dtype, device=tensor.device)
    written = empty.index_put((torch.arange(size, device=tensor.device),), tensor.reshape(-1))
    return written[:size].view(tensor.shape)


@torch.library.custom_op("flexdma::realize", mutates_args=())
def _copied(tensor: Tensor) -> Tensor:
    """A contiguous copy."""
    return tensor.clone(memory_format=torch.contiguous_format)


_copied.register_fake(lambda tensor: torch.empty_like(tensor, memory_format=torch.contiguous_format))
_copied.register_autograd(lambda ctx, gradient: gradient)


@_copied.register_vmap
def _copy_all(info: Any, in_dims: Sequence[int], tensor: Tensor) -> tuple[Tensor, int]:
    return _copied(tensor.movedim(in_dims[0], 0)), 0


def apart(tensor: Tensor) -> Tensor:
    """The tensor as a buffer of its own in a graph that Inductor compiles for a GPU; elsewhere the tensor itself.

    Inductor would otherwise compute a gate again in each of the many kernels of selection and state, and torch 2.11 fails to
    generate some of the kernels that it fuses from them.  So this is a copy, which it fuses with nothing.
    """
    return _copied(tensor) if is_fused(tensor) else tensor


def is_fused(tensor: Tensor) -> bool:
    """Whether Inductor compiles this call for a GPU."""
    return tensor.device.type != "cpu" and torch.compiler.is_compiling() and not is_exporting()


def opaque_on_cpu(name: str, shapes: Callable[..., list[Tensor]]) -> Callable[[Tensors], Tensors]:
    """Decorator: on a CPU the function is one opaque operator `flexdma::name`; on other devices it is traced and fused.

    torch.export traces it on every device.

    The device of the first argument, a tensor, decides.  `shapes` takes the same arguments and returns empty outputs.
    Outputs are made contiguous and have no gradient.  All tensors, in and out, are [B, ...] of the same B.
    """
    return _opaque(name, shapes, everywhere=False)


def opaque(name: str, shapes: Callable[..., list[Tensor]]) -> Callable[[Tensors], Tensors]:
    """As `opaque_on_cpu` on every device, and refused in torch.export: for loops that a tracer would unroll."""
    return _opaque(name, shapes, everywhere=True)


def _opaque(name: str, shapes: Callable[..., list[Tensor]], *, everywhere: bool) -> Callable[[Tensors], Tensors]:
    def decorate(function: Tensors) -> Tensors:
        def implementation(*arguments: Any) -> list[Tensor]:
            return [output.clone(memory_format=torch.contiguous_format) for output in function(*arguments)]

        implementation.__annotations__ = dict(function.__annotations__)
        schema = torch.library.infer_schema(function, mutates_args=())
        operator = torch.library.custom_op(f"flexdma::{name}", implementation, mutates_args=(), schema=schema)
        operator.register_fake(shapes)
        operator.register_vmap(partial(joined_batches, operator))

        def dispatch(first: Tensor, *rest: Any) -> list[Tensor]:
            # torch.func.vmap has a rule for the whole operator, but not for all in-place operations inside it.
            # A program of torch.export runs where there is no Python.
            if everywhere and is_exporting():
                raise NotImplementedError(
                    f"torch.export: expected lifespans from outside of the program, as {name} is a loop over positions"
                )
            whole = ((everywhere or first.device.type == "cpu") and not is_exporting()) or is_transformed()
            return operator(first, *rest) if whole else function(first, *rest)

        dispatch.__doc__, dispatch.__name__ = function.__doc__, function.__name__
        return dispatch  # type: ignore[return-value]

    return decorate


def joined_batches(operator: Callable, info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[list, list]:
    """The rule of `torch.func.vmap`: it joins the mapped dimension of size n and the batch, [n B, ...]."""

    def joined(argument: Any, dim: int | None) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        every = argument.expand(info.batch_size, *argument.shape) if dim is None else argument.movedim(dim, 0)
        return every.flatten(0, 1)

    outputs = operator(*map(joined, arguments, in_dims))
    return [output.unflatten(0, (info.batch_size, -1)) for output in outputs], [0] * len(outputs)
