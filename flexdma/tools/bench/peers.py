"""Kernels of other projects, timed where they are installed.  flexdma neither needs nor installs them.

They compute other functions; each contender's name has its selection.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flexdma.tools.shapes import Shape
from flexdma.tools.timing import UnavailableError

FLASH_SPARSE_ATTN = "flash-sparse-attn<2"  # 2.x, PyPI's default, takes no mask
NSA_GROUP = 16  # NSA's kernels need multiples of 16 query heads per KV head
NSA_BLOCK = 64


def peers(shape: Shape, tensors: list[Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Name -> call; a peer that is not installed raises UnavailableError when called."""
    query, key, value, _gate = tensors
    return {
        "flash_sparse_attn (Triton, one top-w for all queries)": partial(_flash_sparse_attn, shape, *tensors),
        f"NSA, {-(-shape.window // NSA_BLOCK)} blocks of {NSA_BLOCK} chosen by the query, one KV head per {NSA_GROUP}": (
            partial(_nsa, shape, query, key, value)
        ),
    }


def _module(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        raise UnavailableError("not installed")


def _flash_sparse_attn(shape: Shape, query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """github.com/flash-algo/flash-sparse-attention, called as in its README, with its mask made inside the timer."""
    _module("flash_sparse_attn")
    version = importlib.metadata.version("flash-sparse-attn")
    if int(version.split(".")[0]) >= 2:
        raise UnavailableError(f"version {version} takes no mask: pip install '{FLASH_SPARSE_ATTN}'")
    from flash_sparse_attn import flash_sparse_attn_func_auto
    from flash_sparse_attn.utils.mask import create_mask

    bias = gate[:, :, None].to(query.dtype)  # [B, Hkv, 1, N]
    mask = create_mask(
        attention_bias=bias.detach(), attention_mask=None, batch_size=1, query_len=shape.length, key_len=shape.length,
        window_size=shape.window, min_dtype=torch.finfo(query.dtype).min,
    )  # fmt: skip
    heads_last = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    attend = flash_sparse_attn_func_auto(backend="triton")
    output = attend(*heads_last, attn_mask=mask, attn_bias=bias, is_causal=True, softmax_scale=shape.size**-0.5)
    return output.transpose(1, 2)


def _nsa(shape: Shape, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Native Sparse Attention (arXiv 2502.11089): compressed attention that selects w / 64 blocks, no sliding window."""
    if importlib.util.find_spec("native_sparse_attention") is not None:
        from native_sparse_attention.ops.parallel import parallel_nsa
    else:
        _module("fla")
        from fla.ops.nsa import parallel_nsa

    heads = shape.query_heads // NSA_GROUP
    if not heads:
        raise UnavailableError(f"needs {NSA_GROUP} query heads")
    heads_last = [tensor.transpose(1, 2) for tensor in (query, key[:, :heads], value[:, :heads])]
    share = query.new_full((1, shape.length, shape.query_heads), 0.5)
    output = parallel_nsa(
        *heads_last, g_cmp=share, g_slc=share, g_swa=share, block_counts=-(-shape.window // NSA_BLOCK),
        block_size=NSA_BLOCK, window_size=0,
    )  # fmt: skip
    return output.transpose(1, 2)
