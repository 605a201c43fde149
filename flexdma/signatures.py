"""The two callables that FlexAttention takes, as types.

Index arguments are tensors: 0-d where FlexAttention maps them, broadcastable where the gather and dense lowerings call the
same function on whole tiles.  Index captured tensors in one step (`t[b, h, i, j]`): chained indexing corrupts memory in
compiled kernels.
"""

from collections.abc import Callable

from torch import Tensor

# (score, b, h, q_idx, kv_idx) -> score
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# (b, h, q_idx, kv_idx) -> bool
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
