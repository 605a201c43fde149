"""Types of arguments: the two callables that FlexAttention takes, intervals of keys, and options of operators and layers.

Index arguments are tensors: 0-d where FlexAttention maps them, broadcastable where the gather and dense lowerings call the
same function on whole tiles.  Index captured tensors in one step (`t[b, h, i, j]`), because chained indexing corrupts memory
in compiled kernels.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypedDict

from torch import Tensor

# (score, b, h, q_idx, kv_idx) -> score
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
# (b, h, q_idx, kv_idx) -> bool
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Birth and death of each key, or several such pairs for each key; and the bias of a key, or one for each pair.
Intervals = tuple[Tensor, Tensor] | Sequence[tuple[Tensor, Tensor]]
Biases = Tensor | Sequence[Tensor | None] | None


def modified_scores(score_mod: ScoreMod, scores: Tensor, *index: Tensor) -> Tensor:
    """score_mod of whole tiles, in their shape and dtype.  index: b, h, q_idx and kv_idx, which broadcast to the tiles.

    Raises TypeError where score_mod returns no tensor.
    """
    modified = score_mod(scores, *index)
    if not isinstance(modified, Tensor):
        raise TypeError(f"score_mod: expected a function that returns a tensor, got {type(modified).__name__} from it")
    return modified.to(scores.dtype).expand_as(scores)


class VarlenOptions(TypedDict, total=False):
    """The keywords of `dynamic_mask_attention_varlen` besides window_size and return_state."""

    selection: str
    scale: float | None
    score_mod: ScoreMod | None
    bias: Tensor | None
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


class LayerOptions(TypedDict, total=False):
    """The keywords of the layers' forward passes besides state and return_state."""

    key_padding_mask: Tensor | None
    document_ids: Tensor | None
    cu_seqlens: Tensor | None
    score_mod: ScoreMod | None
    donate: bool
