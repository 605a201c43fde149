"""Dynamic Mask Attention by a dense mask, with the algorithm of Hugging Face's Doge.

It writes every query's row of gates, takes a top-w of the row, sets the others to -inf and adds the result to the scores:
O(N^2 log w) time and several tensors [Hkv, N, N].
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flexdma.tools.shapes import Shape
from flexdma.tools.timing import UnavailableError

GIB = 2**30
CPU_LONGEST = 8192  # 20 seconds a run at twice that


def dense_mask_attention(query: Tensor, key: Tensor, value: Tensor, gate: Tensor, window_size: int) -> Tensor:
    """The same result as `dynamic_mask_attention` where no gates are equal (topk breaks ties arbitrarily).

    query [B, Hq, N, D], key and value [B, Hkv, N, D], gate [B, Hkv, N].
    """
    length = key.shape[2]
    later = torch.ones(length, length, dtype=torch.bool, device=gate.device).triu(1)
    bias = gate[:, :, None].masked_fill(later, float("-inf"))  # [B, Hkv, N, N]
    if length > window_size:
        chosen = bias.detach().topk(window_size, dim=-1, sorted=False).indices
        others = torch.ones_like(bias, dtype=torch.bool).scatter_(-1, chosen, False)
        bias = bias.masked_fill(others, float("-inf"))
    # Repeat heads, as Doge does, because PyTorch's fused kernels take a mask or grouped heads, not both.
    group = query.shape[1] // key.shape[1]
    key, value, bias = (tensor.repeat_interleave(group, 1) for tensor in (key, value, bias.to(query.dtype)))
    return scaled_dot_product_attention(query, key, value, attn_mask=bias)


def bytes_needed(shape: Shape, element: int) -> int:
    """Approximate peak memory: biases and topk's result per KV head, bias (and scores) per query head."""
    pairs = shape.length**2
    per_head = pairs * (4 + 4 + 1) + 12 * shape.length * min(shape.window, shape.length)
    # The backward of SDPA with a mask that needs a gradient keeps scores, weights and their gradients.
    return shape.heads * per_head + shape.query_heads * pairs * element * (5 if shape.backward else 1)


def check_fits(shape: Shape, element: int, device: str) -> None:
    """Raise UnavailableError where it does not fit or takes minutes; a CPU process out of memory would be killed."""
    if device == "cpu" and shape.length > CPU_LONGEST:
        raise UnavailableError(f"skipped: slower than all others together above N={CPU_LONGEST}")
    needed, free = bytes_needed(shape, element), free_bytes(device)
    if needed > 0.7 * free:
        raise UnavailableError(f"skipped: dense masks need about {needed / GIB:.0f} GiB, {free / GIB:.0f} GiB are free")


def free_bytes(device: str) -> float:
    """Free memory of the device, including PyTorch's cache; infinite where the system does not report it."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")
