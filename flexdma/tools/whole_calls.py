"""Whole calls of the operator, and of causal attention to all keys for comparison."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flexdma import dynamic_mask_attention
from flexdma.tools.shapes import Shape
from flexdma.tools.timing import backward_of

CAUSAL, EAGER, COMPILED = "SDPA causal", "flexdma (default, eager call)", "flexdma flex, compiled"
COMPILED_DEFAULT = "flexdma (default, compiled)"
# A score_mod forbids the fused kernel, also one that changes nothing.
PLAIN, COMPILED_PLAIN = "flexdma with a score_mod, eager call", "flexdma with a score_mod, compiled"

Compile = Callable[..., Callable[..., Tensor]]
compile_whole: Compile = partial(torch.compile, fullgraph=True, dynamic=False)


def whole_calls(
    shape: Shape, tensors: list[Tensor], compiler: Compile = compile_whole
) -> dict[str, Callable[[], Tensor]]:
    """Name -> call.  SDPA by each backend of the device comes first; the others are compared with the fastest of them."""
    query, key, value, _gate = tensors
    cuda = query.is_cuda
    options: dict[str, Any] = {"window_size": shape.window}
    calls = sdpa_causal(query, key, value)
    compiled = compiler(dynamic_mask_attention)
    # On CUDA the default is compiled flex too, and would only compile again.
    if not cuda:
        calls[EAGER] = partial(dynamic_mask_attention, *tensors, **options)
        calls[COMPILED_DEFAULT] = partial(compiled, *tensors, **options)
    # Without a gradient compiled plain operations hold all N (w + block) scores at once, so inference is not run that way.
    if not cuda and shape.backward:
        calls[PLAIN] = partial(dynamic_mask_attention, *tensors, **options, score_mod=unchanged)
        calls[COMPILED_PLAIN] = partial(compiled, *tensors, **options, score_mod=unchanged)
    if cuda or not shape.backward:  # torch has no backward of FlexAttention on a CPU
        calls[COMPILED] = partial(compiled, *tensors, **options, lowering="flex")
    return calls


def unchanged(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """A score_mod that returns the score."""
    return score


def sdpa_causal(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Causal attention to all keys: PyTorch's choice on a CPU, each fused backend on CUDA."""
    attend = partial(scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    if not query.is_cuda:
        return {CAUSAL: partial(attend, query, key, value)}
    group = query.shape[1] // key.shape[1]

    def by(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            if backend == SDPBackend.EFFICIENT_ATTENTION:  # does not support grouped heads
                keys, values = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
                return scaled_dot_product_attention(query, keys, values, is_causal=True)
            return attend(query, key, value)

    return {
        f"{CAUSAL}, flash": partial(by, SDPBackend.FLASH_ATTENTION),
        f"{CAUSAL}, cudnn": partial(by, SDPBackend.CUDNN_ATTENTION),
        f"{CAUSAL}, efficient": partial(by, SDPBackend.EFFICIENT_ATTENTION),
    }


def as_steps(
    calls: Mapping[str, Callable[[], Tensor]], shape: Shape, tensors: list[Tensor]
) -> dict[str, Callable[[], None]]:
    """The calls, each followed by its backward where the shape has one."""
    return {name: partial(_step, call, tensors, shape.backward) for name, call in calls.items()}


def fastest_causal(seconds: Mapping[str, float]) -> float | None:
    """Seconds of causal SDPA by the fastest of its backends; None if none was timed."""
    return min((s for name, s in seconds.items() if name.startswith(CAUSAL)), default=None)


def _step(call: Callable[[], Tensor], tensors: list[Tensor], backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        output = call()
        if backward:
            backward_of(output, tensors)
