"""The flex lowering as plain PyTorch, gradients included: FlexAttention uncompiled, which differentiates on a CPU once its
device check is out of the way.
"""

import contextlib
from unittest import mock

import torch.nn.attention.flex_attention as torch_flex

from flexdma.attention import select
from flexdma.lowerings import flex


def flex_with_gradients(
    query, key, value, gate, *, window_size, selection="causal", scale=None, score_mod=None, sink_logits=None, **choice
):
    """The operator by the flex lowering, uncompiled, in small blocks."""
    lifespans = select(selection, gate, window_size, choice)
    widest = (
        gate.shape[-1] if window_size is None else max(window_size) if isinstance(window_size, list) else window_size
    )
    capacity = widest + choice.get("sinks", 0) + choice.get("recent", 0)
    with _gradients_on_a_cpu():
        return flex.flex_attend(
            query, key, value, gate, lifespans, capacity=capacity, scale=query.shape[-1] ** -0.5 if scale is None else scale,
            score_mod=score_mod, block_size=(32, 16), kernel_options=None, needs_gradient=True,
            sink_logits=sink_logits,
        )  # fmt: skip


@contextlib.contextmanager
def _gradients_on_a_cpu():
    with contextlib.ExitStack() as stack:
        for check in ("_validate_device", "_validate_nestedness"):  # one check before torch 2.13, two since
            if hasattr(torch_flex, check):
                stack.enter_context(mock.patch.object(torch_flex, check, return_value=None))
        yield
