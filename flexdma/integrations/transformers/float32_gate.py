"""The gate of a converted model, which stays float32 where the model is cast to a dtype of 16 bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from flexdma.gates import ValueGate


class Float32Gate(ValueGate):
    """A `ValueGate` that `model.half()`, `model.bfloat16()` and `model.to(dtype)` move, but do not narrow.

    bfloat16 would lose small steps of A, and float16 has no numbers as small as stored slopes.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.A.dtype != torch.float32:  # the default dtype is another
            self.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = tensor.is_floating_point() and moved.dtype.itemsize < 4 <= tensor.dtype.itemsize
            return tensor.to(moved.device) if narrowed else moved

        return super()._apply(wide, recurse)
