"""kernel_options={"BACKEND": "FLASH"}: FlexAttention by flash-attn-4 (CuTe DSL) instead of Triton kernels.

torch accepts flexdma's graphs on this backend where no captured tensor needs a gradient, so the gate's gradient takes the
route "transposed".  The block sizes are read from the sources of flash-attn-4 4.0.0b36.  Nothing of this has run on a GPU
yet (docs/kernels.md).
"""

import importlib.util
from collections.abc import Mapping

import torch

# Compute capabilities (major) whose kernels have both a score_mod and block sparsity.
CAPABILITIES = (9, 10, 11)
DTYPES = (torch.bfloat16, torch.float16)


def is_flash(kernel_options: Mapping[str, object] | None) -> bool:
    """Whether the caller requests this backend."""
    return kernel_options is not None and kernel_options.get("BACKEND") == "FLASH"


# Dynamo calls both functions while tracing; their results are constants of the graph.
@torch.compiler.assume_constant_result
def refusal(device: torch.device, dtype: torch.dtype, head_dims: tuple[int, ...], sinks_train: bool) -> str:
    """Why the backend cannot compute a call; "" if it can."""
    prefix = "kernel_options: BACKEND 'FLASH' "
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{prefix}computes on NVIDIA GPUs, got tensors on {device.type}"
    major = torch.cuda.get_device_capability(device)[0]
    if major not in CAPABILITIES:
        return f"{prefix}has score_mods and sparse blocks for compute capabilities 9 to 11, got {major}"
    if dtype not in DTYPES:
        return f"{prefix}computes in bfloat16 and float16, got {dtype}"
    if any(size % 8 for size in head_dims):
        return f"{prefix}expects head sizes that are multiples of 8, got {head_dims}"
    if sinks_train:
        return f"{prefix}has no gradient of the log-sum-exp, which sink_logits need in training"
    if importlib.util.find_spec("flash_attn") is None or importlib.util.find_spec("flash_attn.cute") is None:
        return f"{prefix}needs the package flash-attn-4: pip install --pre flash-attn-4"
    return ""


@torch.compiler.assume_constant_result
def flash_block_size(device: torch.device, head_dim: int, trains: bool) -> tuple[int, int]:
    """(rows, keys) of a mask block that its kernels accept, in training also with rows and keys exchanged."""
    if torch.cuda.get_device_capability(device)[0] == 9:
        if head_dim <= 128:
            return 128, 128
        return (64, 64) if trains else (128, 64)  # its tiles have 80 keys, unless a block has fewer
    return (256, 256) if trains else (256, 128)  # a tile has two stages of 128 rows
