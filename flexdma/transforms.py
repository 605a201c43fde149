"""Detection of what surrounds a call: a transformation of torch.func, forward-mode AD, or a tracer.

Kernels without derivatives, and Python that reads values of tensors, work only outside of all of these.
"""

import torch
from torch import Tensor
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether results computed from these tensors may need a backward."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_transformed() -> bool:
    """Whether the call is inside vmap, grad, jvp, ... of `torch.func`, or inside `forward_ad.dual_level`.

    It looks at the call, not at its tensors, because a score_mod may capture transformed tensors.
    """
    return forward_ad._current_level >= 0 or _is_inside_functorch()


@torch.compiler.assume_constant_result  # constant while tracing; torch.compile guards on it
def _is_inside_functorch() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_recorded(tensor: Tensor) -> bool:
    """Whether an eager call records operations (make_fx) or computes only shapes (meta or fake tensors)."""
    if torch.compiler.is_compiling():
        return False
    return (
        tensor.is_meta or isinstance(tensor, FakeTensor) or _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None
    )


def can_read(tensor: Tensor) -> bool:
    """Whether Python may read values of this call's tensors: the call is eager and its tensors hold values."""
    return not (torch.compiler.is_compiling() or is_transformed() or is_recorded(tensor))


def is_plain_on_cpu(*tensors: Tensor) -> bool:
    """`can_read` and not `needs_gradient`, of tensors on a CPU.  One function, because a decoded token waits for it."""
    if (
        torch.compiler.is_compiling()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _get_dispatch_mode(_TorchDispatchModeKey.PROXY) is not None
    ):
        return False
    differentiates = torch.is_grad_enabled()
    for tensor in tensors:
        if type(tensor) is not Tensor or not tensor.is_cpu or (differentiates and tensor.requires_grad):
            return False
    return True


@torch.compiler.assume_constant_result  # Dynamo of torch 2.11 takes it for true in every compilation
def is_exporting() -> bool:
    """Whether `torch.export` traces the call."""
    return torch.compiler.is_exporting()


def refuse_jit_trace() -> None:
    """Raise inside `torch.jit.trace`, which would record the selection of its example input as constants."""
    if torch.jit.is_tracing():
        raise NotImplementedError(
            "torch.jit.trace: expected torch.export.export or torch.compile; it would record the keys selected for the "
            "example input as constants"
        )
