"""Which lowering `lowering=None` takes."""

import torch

# Asked once: inside torch.compile the question cannot be traced.  The C++ kernel is written for AVX2 and up.
CPU_HAS_FLEX = torch.cpu._is_avx2_supported()
FLEX_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose_lowering(device_type: str, dtype: torch.dtype, *, needs_gradient: bool) -> str:
    """The lowering for tensors of this device type ("cpu", "cuda", ...) and dtype, here and now.

    "flex" on CUDA; on a CPU inside torch.compile, where no gradient is needed (torch has no CPU backward for it).
    "gather" otherwise: CPU training; eager CPU calls, which it serves at once and faster (docs/benchmarks.md); float64; other
    devices.  "dense" is never chosen.  Inside torch.compile the answer is that of the compiled code.

        choose_lowering("cpu", torch.float32, needs_gradient=True)      "gather"
    """
    if dtype not in FLEX_DTYPES:
        return "gather"
    if device_type == "cuda":
        return "flex"
    if device_type == "cpu" and torch.compiler.is_compiling() and not needs_gradient and CPU_HAS_FLEX:
        return "flex"
    return "gather"
