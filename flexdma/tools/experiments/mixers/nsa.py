"""Native Sparse Attention (arXiv 2502.11089): summaries of keys, blocks chosen by them, and a window, joined by gates."""

import torch
from torch import Tensor, nn

from flexdma import DynamicMaskAttention
from flexdma.block_masks import nsa_block_mask, nsa_selection
from flexdma.tools.experiments.mixers.mixer import ModelSizes
from flexdma.tools.experiments.mixers.routed import Heads, attend, dense


class NativeSparseAttention(DynamicMaskAttention):
    """The outputs of three branches, weighted by sigmoids of the hidden states, one per head and branch:

    compressed: a summary of w / 4 keys every w / 8 keys, all that end at or before the query.  Their keys are not rotated.
    selected: 6 blocks of w / 8 keys: the first, the query's own, and the 4 with the most attention to their summaries.
    window: the last w / 4 keys.

    The branches share keys and values, as in native-sparse-attention-pytorch.  In the paper each has its own, which costs
    little where there are many query heads per KV head; here it would double the layer.
    """

    def __init__(self, sizes: ModelSizes) -> None:
        heads = (sizes.heads, sizes.kv_heads, sizes.head_dim)
        super().__init__(sizes.width, *heads, None, selection="full", qk_norm=True)
        self.stride, self.summary_size = sizes.window // 8, sizes.window // 4
        self.key_summary, self.value_summary = (
            _Summary(self.summary_size, self.stride, sizes.head_dim) for _ in range(2)
        )
        self.branch_proj = nn.Linear(sizes.width, 3 * sizes.heads, bias=False)

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        """[B, N, width] -> the same."""
        query, key, value = self.project(hidden_states)
        rotated = Heads(query, key).rotated(position_embeddings)
        position = torch.arange(query.shape[2], device=query.device)
        age = position[:, None] - position

        summaries = self.key_summary(key)
        outputs = torch.stack(
            [
                self._compressed(query, summaries, self.value_summary(value)),
                attend(*rotated, value, self._selected(query, summaries)),
                attend(*rotated, value, (age >= 0) & (age < self.summary_size)),
            ]
        )
        weights = self.branch_proj(hidden_states).sigmoid().unflatten(-1, (3, -1)).permute(2, 0, 3, 1)  # [3, B, H, N]
        return self._joined((weights[..., None] * outputs).sum(0), hidden_states)

    def _compressed(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention to the summaries of tokens at or before each query; 0 where there is none."""
        end = self.stride * torch.arange(keys.shape[2], device=query.device) + self.summary_size - 1
        visible = end <= torch.arange(query.shape[2], device=query.device)[:, None]
        sees_none = ~visible.any(-1, keepdim=True)
        # Not every kernel gives 0 for a query without a key, so such a query attends to all, and its output is cleared.
        return attend(query, keys, values, visible | sees_none).masked_fill(sees_none, 0.0)

    def _selected(self, query: Tensor, summaries: Tensor) -> Tensor:
        """By the recipe, bool [B, Hq, N, N]."""
        length = query.shape[2]
        chosen = nsa_selection(
            query, summaries, num_keys=length, compressed_size=self.summary_size, stride=self.stride,
            selected_size=self.stride, top_n=6, initial=1, local=1,
        )  # fmt: skip
        return dense(nsa_block_mask(chosen, num_query_heads=self.num_heads, num_keys=length, selected_size=self.stride))


class _Summary(nn.Module):
    """[B, H, N, D] -> [B, H, summaries, D]: an MLP of the tokens of a summary, with an embedding of their places."""

    def __init__(self, size: int, stride: int, head_dim: int) -> None:
        super().__init__()
        self.size, self.stride = size, stride
        self.place = nn.Parameter(torch.zeros(size, head_dim))
        self.mlp = nn.Sequential(nn.Linear(size * head_dim, head_dim), nn.GELU(), nn.Linear(head_dim, head_dim))

    def forward(self, tensor: Tensor) -> Tensor:
        """Summary c is of the tokens c * stride .. c * stride + size - 1."""
        windows = tensor.unfold(2, self.size, self.stride).mT + self.place  # [B, H, summaries, size, D]
        return self.mlp(windows.flatten(3))
