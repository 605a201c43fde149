"""Whole mechanisms of other packages, which are imported when a layer is made."""

import torch
from torch import Tensor, nn

from flexdma.tools.experiments.mixers.mixer import ModelSizes


class Doge(nn.Module):
    """Dynamic mask attention as transformers has it, in dense operations.

    While all gates are equal, as before training, it chooses any w keys; `DynamicMaskAttention` chooses the last.
    """

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        from transformers.models.doge.configuration_doge import DogeConfig
        from transformers.models.doge.modeling_doge import DogeAttention

        config = DogeConfig(
            hidden_size=sizes.width, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
            head_dim=sizes.head_dim, keep_window_size=sizes.window, attn_implementation="eager",
        )  # fmt: skip
        self.attention = DogeAttention(config, layer_idx=0)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """[B, N, width] -> the same."""
        length = hidden_states.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=hidden_states.device).tril()[None, None]
        cos, sin = (table[None] for table in position_embeddings)
        return self.attention(hidden_states, (cos, sin), causal)[0]


class NativeSparseAttentionPackage(nn.Module):
    """NSA of native-sparse-attention-pytorch, at the sizes of `NativeSparseAttention`.  It rotates by itself."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        from native_sparse_attention_pytorch import SparseAttention

        part = sizes.window // 8
        # It adds the query's own block to the selected ones, and the query to the window.
        self.attention = SparseAttention(
            dim=sizes.width, dim_head=sizes.head_dim, heads=sizes.heads, kv_heads=sizes.kv_heads, causal=True, norm=False,
            sliding_window_size=2 * part - 1, compress_block_size=2 * part, compress_block_sliding_stride=part,
            selection_block_size=part, num_selected_blocks=5, compress_mlp_expand_factor=1 / (2 * part),
        )  # fmt: skip

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """[B, N, width] -> the same."""
        return self.attention(hidden_states)
