"""The base of mixers whose queries choose blocks of keys: dense attention under the mask of a recipe.

Dense, because the sequences of the experiments are short; the BlockMasks of the recipes are for long ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from flexdma import DynamicMaskAttention
from flexdma.block_masks import moba_block_mask
from flexdma.rotary import rotate
from flexdma.tools.experiments.mixers.mixer import ModelSizes


class Heads(NamedTuple):
    """Query [B, Hq, N, D] and key [B, Hkv, N, D]."""

    query: Tensor
    key: Tensor

    def rotated(self, position_embeddings: tuple[Tensor, Tensor]) -> "Heads":
        """Both at their positions."""
        return Heads(*(rotate(tensor, *position_embeddings) for tensor in self))


class RoutedAttention(DynamicMaskAttention):
    """Attention under the mask that `visible` chooses, with the projections and heads of full attention."""

    def __init__(self, sizes: ModelSizes) -> None:
        heads = (sizes.heads, sizes.kv_heads, sizes.head_dim)
        super().__init__(sizes.width, *heads, None, selection="full", qk_norm=True)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        """[B, N, width] -> the same."""
        query, key, value = self.project(hidden_states)
        rotated = Heads(query, key).rotated(position_embeddings)
        visible = self.visible(rotated, Heads(query, key))
        return self._joined(attend(*rotated, value, visible), hidden_states)

    def visible(self, rotated: Heads, plain: Heads) -> Tensor:
        """Which keys each query sees, bool [B, Hq, N, N].  plain: before the rotary embedding."""
        raise NotImplementedError


class MoBA(RoutedAttention):
    """The query's own chunk of w / 4 keys, and the 3 best earlier ones (arXiv 2502.13189)."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__(sizes)
        self.chunk_size = sizes.window // 4

    def visible(self, rotated: Heads, plain: Heads) -> Tensor:
        """By the recipe."""
        return dense(moba_block_mask(*rotated, chunk_size=self.chunk_size, top_k=4))


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """[B, Hq, N, D].  visible: bool, to be broadcast to [B, Hq, N, K]; each query sees a key."""
    return scaled_dot_product_attention(query, key, value, attn_mask=visible, enable_gqa=True)


def dense(mask: BlockMask) -> Tensor:
    """The mask as bool [B, Hq, Q, K]."""
    device = mask.kv_num_blocks.device
    b, h, q, k = (
        torch.arange(size, device=device).view([-1 if axis == dim else 1 for dim in range(4)])
        for axis, size in enumerate(mask.shape)
    )
    return mask.mask_mod(b, h, q, k)
