"""Types of arguments: the two callables that FlexAttention takes, and the options of both operators.

Index arguments are tensors: 0-d where FlexAttention maps them, broadcastable where the gather and dense lowerings call the
same function on whole tiles.  Index captured tensors in one step (`t[b, h, i, j]`), because chained indexing corrupts memory
in compiled kernels.
"""

from collections.abc import Callable, Mapping
from typing import TypedDict

from torch import Tensor

# (score, b, h, q_idx, kv_idx) -> score
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# (b, h, q_idx, kv_idx) -> bool
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class VarlenOptions(TypedDict, total=False):
    """The keywords of `dynamic_mask_attention_varlen` besides window_size and return_state."""

    selection: str
    scale: float | None
    score_mod: ScoreMod | None
    sinks: int
    recent: int
    lowering: str | None
    block_size: int | tuple[int, int] | None
    kernel_options: Mapping[str, object] | None
    sink_logits: Tensor | None


class AttentionOptions(VarlenOptions, total=False):
    """The keywords of `dynamic_mask_attention` besides window_size, state and return_state."""

    key_padding_mask: Tensor | None
    document_ids: Tensor | None
    donate: bool
