"""The float mask of PyTorch's CPU attention kernel, by arithmetic.

PyTorch vectorises neither broadcast comparisons nor `where` (10 times slower, measured).
"""

import math

import torch
from torch import Tensor


def without_nan(bias: Tensor) -> Tensor:
    """The biases with inf for NaN.

    minimum(NaN, -inf) is NaN, which would reach queries that do not see the key.  inf gives NaN in the softmax of queries
    that do.
    """
    return torch.where(bias.isnan(), math.inf, bias)


def seen_bound(birth: Tensor, death: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """[..., C], [..., C], relative to the block's first query -> [..., block, C]: inf where a query sees the key, else -inf.

    birth = [-1 0 1], death = [1 3 2]        query 0:  inf  inf -inf
                                             query 1: -inf  inf  inf
                                             query 2: -inf  inf -inf
    """
    # Clamped, so that floats represent them exactly.
    birth, death = (position.clamp(-1, block + 1).to(dtype).unsqueeze(-2) for position in (birth, death))
    # Query i is at i + 0.5, so it never equals a bound: seen <=> |query - centre| < radius.
    query = (torch.arange(block, dtype=dtype, device=birth.device) + 0.5)[:, None]
    return (query - (birth + death) / 2).abs_().sub_((death - birth) / 2).mul_(-math.inf)
