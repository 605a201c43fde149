"""The lowering of a call, and the options that it takes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from flexdma import checks
from flexdma.lowerings.default_options import bare_name
from flexdma.transforms import is_transformed

FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_lowering(device_type: str, dtype: torch.dtype) -> str:
    """The lowering for tensors of this device type ("cpu", "cuda", ...) and dtype.

    "flex" on CUDA, "gather" for float64 and on other devices, eager or inside torch.compile.  "dense" is never chosen.

        choose_lowering("cpu", torch.float32)      "gather"
    """
    return "flex" if device_type == "cuda" and dtype in FLEX_DTYPES else "gather"


def chosen_lowering(lowering: str | None, query: Tensor) -> str:
    """The lowering of this call.  Raises ValueError where the given one is unknown, or is flex inside torch.func."""
    checks.one_of("lowering", lowering, (None, *checks.LOWERINGS))
    chosen = lowering or choose_lowering(query.device.type, query.dtype)
    if chosen == "flex" and is_transformed():
        if lowering is not None:
            raise ValueError(
                "lowering: 'flex' has no rules for torch.func and forward-mode AD; expected 'gather', 'dense' or None"
            )
        return "gather"
    return chosen


def check_lowering_options(
    lowering: str,
    dtype: torch.dtype,
    block_size: int | tuple[int, int] | None,
    kernel_options: Mapping[str, object] | None,
) -> None:
    """Raise unless the lowering computes this dtype and takes these options."""
    if lowering == "flex" and dtype not in FLEX_DTYPES:
        raise TypeError(f"lowering: 'flex' computes in float32, bfloat16 and float16, got {dtype}; expected 'gather'")
    if kernel_options is not None and not isinstance(kernel_options, Mapping):
        raise TypeError(f"kernel_options: expected a dict, got {type(kernel_options).__name__}")
    if kernel_options is not None and lowering != "flex":
        raise ValueError(
            f"kernel_options: expected None for lowering={lowering!r} (they are FlexAttention's), got {kernel_options!r}"
        )
    if any(bare_name(option) == "PRESCALE_QK" and wanted for option, wanted in (kernel_options or {}).items()):
        raise ValueError(
            "kernel_options: expected no PRESCALE_QK, with which logits are binary logarithms and gates are added to them as "
            "natural ones"
        )
    if block_size is None:
        return
    if lowering == "dense":
        raise ValueError(f"block_size: expected None for lowering='dense', got {block_size!r}")
    if lowering == "gather":
        checks.positive_int("block_size", block_size)  # of queries; gather has no key blocks
    else:
        checks.block_sizes(block_size)
