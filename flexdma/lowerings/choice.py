"""The lowering that `lowering=None` chooses."""

import torch

FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_lowering(device_type: str, dtype: torch.dtype) -> str:
    """The lowering for tensors of this device type ("cpu", "cuda", ...) and dtype.

    "flex" on CUDA, "gather" for float64 and on other devices, eager or inside torch.compile.  "dense" is never chosen.

        choose_lowering("cpu", torch.float32)      "gather"
    """
    return "flex" if device_type == "cuda" and dtype in FLEX_DTYPES else "gather"
