"""Run kernels that were generated for a GPU on CPU tensors, in Triton's interpreter.

It is slow (seconds for 200 tokens), and tests generated kernels on machines without a GPU.  A whole generated module runs:
kernels in the interpreter, and the operators between them as ATen's for the CPU.

Needs its own process with TRITON_INTERPRET=1 set before Triton is imported.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config
from torch._subclasses.fake_tensor import FakeTensorMode

from flexdma.lowerings import running_maximum
from flexdma.tools.inspect.call import run_once
from flexdma.tools.inspect.capture import TritonLaunches, watching
from flexdma.tools.inspect.kernel import Kernel
from flexdma.tools.inspect.standins import install
from flexdma.tools.inspect.targets import known_target


class InterpretedCall:
    """`function(*tensors)` and its backward, compiled for a target, to run on values of the same shapes.

    function: takes tensors; generated once, for their shapes, dtypes and requires_grad.
    """

    def __init__(self, function: Callable, tensors: Sequence[Tensor], target: str = "sm_90") -> None:
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                "expected TRITON_INTERPRET=1 in the environment of the process, before Triton is imported"
            )
        install(known_target(target))
        _patch_the_language_once()
        _do_not_check_for_overflow()
        _multiply_bfloat16_as_float32()
        _do_without_libdevice()
        _add_atomically_at_contiguous_addresses()
        _take_the_largest_at_once()
        running_maximum.BLOCK = 8  # programs of the interpreter, not their sizes, cost time
        # Fake tensors have no address, so Inductor would copy them as misaligned.
        aligned = config.patch(assume_aligned_inputs=True)
        with aligned, FakeTensorMode(), watching(launch=False, device="cuda") as self.seen:
            fakes = [
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda", requires_grad=t.requires_grad)
                for t in tensors
            ]
            run_once(function, tuple(fakes), {})
        self._forward, *self._backward = (call for _, call, _, _ in self.seen.calls)
        inputs = self.seen.calls[0][2]
        # The generated module takes the tensors in another order.
        self._order = [next(n for n, fake in enumerate(fakes) if fake is value) for value in inputs]
        self._differentiable = [tensor.requires_grad for tensor in tensors]
        for call in (self._forward, *self._backward):
            _move_to_the_cpu(call)

    @property
    def attention(self) -> list[Kernel]:
        """The attention kernels, forward then backward."""
        return [kernel for kernel in self.seen.kernels if kernel.is_attention]

    def run(self, tensors: Sequence[Tensor], gradient: Tensor | None = None) -> list[Tensor]:
        """The output for these values; with the gradient of the output, also those of the differentiable tensors."""
        output, *saved = self._forward([tensors[n].detach() for n in self._order])
        if gradient is None:
            return [output]
        arguments = [*saved, gradient]
        for have, want in zip(arguments, self.seen.calls[1][2], strict=True):
            if (have.shape, have.stride(), have.dtype) != (want.shape, want.stride(), want.dtype):
                raise RuntimeError(
                    f"the backward expects {want.dtype} {list(want.shape)}, the forward left {list(have.shape)}"
                )
        gradients = dict(zip(self._order, self._backward[0](arguments), strict=True))
        return [output, *(gradients[n] for n, wanted in enumerate(self._differentiable) if wanted)]

    def rewrite(self, change: Callable[[Kernel], str]) -> None:
        """Replace the source of the attention kernels, for negative controls of tests."""
        from torch._inductor.codecache import PyCodeCache

        for call in (self._forward, *self._backward):
            for value in _namespace(call).values():
                if isinstance(value, TritonLaunches) and value.kernel.is_attention:
                    value.tuner = getattr(PyCodeCache.load(change(value.kernel)), value.kernel.name)


def _move_to_the_cpu(call: Callable) -> None:
    namespace = _namespace(call)
    namespace["empty_strided_cuda"] = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)
    for value in namespace.values():
        if isinstance(value, TritonLaunches):
            value.launch = True


def _namespace(call: Callable) -> dict[str, Any]:
    return getattr(call, "__func__", call).__globals__


def _patch_the_language_once() -> None:
    """Triton's interpreter (3.9) replaces the language at each call of a function; once for each is enough."""
    from triton.runtime import interpreter

    patch, seen = interpreter._patch_lang, set()

    def patch_once(function: Any) -> Any:
        if function not in seen:
            seen.add(function)
            patch(function)
        # Nothing is restored: the process runs kernels alone.
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once


def _do_not_check_for_overflow() -> None:
    """Triton's interpreter computes integers again in 64 bits, a quarter of its time; these cases overflow nothing."""
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


def _multiply_bfloat16_as_float32() -> None:
    """Triton's interpreter (3.9) multiplies the bit patterns of bfloat16 matrices as integers; replace that."""
    import numpy
    from triton import language
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    multiply = builder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != language.bfloat16:
            return handle
        bits = handle.data.astype(numpy.uint32) << 16
        return interpreter.TensorHandle(bits.view(numpy.float32), language.float32)

    builder.create_dot = lambda self, a, b, *rest: multiply(self, widened(a), widened(b), *rest)


def _add_atomically_at_contiguous_addresses() -> None:
    """Triton's interpreter reads the operands of an atomic operation as contiguous, broadcast ones too (3.8)."""
    import numpy
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    operate = builder.create_atomic_rmw

    def contiguous(handle: Any) -> Any:
        return interpreter.TensorHandle(numpy.ascontiguousarray(handle.data), handle.dtype)

    builder.create_atomic_rmw = lambda self, operation, pointer, value, mask, *rest: operate(
        self, operation, contiguous(pointer), contiguous(value), contiguous(mask), *rest
    )


def _take_the_largest_at_once() -> None:
    """Triton's interpreter (3.9) reduces by Inductor's `maximum` one number at a time; by NumPy's instead."""
    import numpy
    from torch._inductor.runtime import triton_helpers
    from triton.runtime import interpreter

    one_by_one = interpreter.ReduceOps.generic_reduce

    def reduced(self: Any, inputs: Any) -> Any:
        if self.combine_fn is triton_helpers.maximum:
            return self.min_max(inputs[0], numpy.max)
        return one_by_one(self, inputs)

    interpreter.ReduceOps.generic_reduce = reduced


def _do_without_libdevice() -> None:
    """Replace exp, isnan and isinf, which Inductor calls in CUDA's library and the interpreter does not have."""
    from torch._inductor.runtime import triton_helpers
    from triton import language

    # Look exp up at each call, because the interpreter replaces it while a kernel runs.
    triton_helpers.libdevice.exp = lambda x: language.exp(x)
    triton_helpers.libdevice.isnan = lambda x: x != x
    triton_helpers.libdevice.isinf = lambda x: language.abs(x) == float("inf")
