"""SeerAttention's gate in a causal form: it scores the blocks for each query, and learns which ones the attention looks at.

The gate of arXiv 2410.13276 (`flexdma.block_masks.SeerGate`) pools the queries of a block, and so reads later tokens.  Here
each query scores by itself, as in SeerAttention-R (arXiv 2506.08889).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from flexdma.block_masks import routed_block_mask, seer_loss
from flexdma.block_masks.routed import cell_means, top_cells
from flexdma.rounding import ceil_div
from flexdma.tools.experiments.mixers.mixer import ModelSizes
from flexdma.tools.experiments.mixers.routed import Heads, RoutedAttention, dense


class SeerAttention(RoutedAttention):
    """The query's own block of w / 4 keys, and the 3 earlier blocks with the best scores.

    auxiliary_loss: of the last call with gradients.  It trains the gate, and nothing else does.
    """

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__(sizes)
        size, gate_size = sizes.head_dim, sizes.head_dim // 2
        self.size_of_block = sizes.window // 4
        self.query_proj = nn.Parameter(torch.empty(sizes.heads, size, gate_size))
        self.key_proj = nn.Parameter(torch.empty(sizes.kv_heads, 3 * size, gate_size))
        for weight in (self.query_proj, self.key_proj):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        self.auxiliary_loss: Tensor | None = None

    def visible(self, rotated: Heads, plain: Heads) -> Tensor:
        """By the scores; sets auxiliary_loss."""
        queries, blocks = plain.query.shape[2], ceil_div(plain.key.shape[2], self.size_of_block)
        own = (torch.arange(queries, device=plain.query.device) // self.size_of_block)[:, None]
        block = torch.arange(blocks, device=plain.query.device)
        scores = self._scores(*(tensor.detach() for tensor in plain)).masked_fill(block > own, float("-inf"))
        self.auxiliary_loss = None
        if torch.is_grad_enabled():
            self.auxiliary_loss = seer_loss(scores, self._target(*(tensor.detach() for tensor in rotated)))
        # The score of the query's own block reads later keys, so the block is chosen without it.
        chosen = top_cells(scores.detach().masked_fill(block == own, float("inf")), 4)
        return dense(
            routed_block_mask(
                chosen, num_query_heads=self.num_heads, lengths=(queries, queries), cells=(1, self.size_of_block)
            )
        )

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        """[B, Hq, N, blocks]: the query, projected, times max, min and mean of the block's keys, projected."""
        beyond = (0, 0, 0, -key.shape[2] % self.size_of_block)
        most, least = (
            pad(key, beyond, value=fill).unflatten(2, (-1, self.size_of_block)) for fill in (-torch.inf, torch.inf)
        )
        pooled = torch.cat([most.amax(3), least.amin(3), cell_means(key, self.size_of_block)], -1) @ self.key_proj
        rows = (query @ self.query_proj).unflatten(1, (self.num_kv_heads, -1))
        return (rows @ pooled.mT.unsqueeze(2)).flatten(1, 2) * rows.shape[-1] ** -0.5

    def _target(self, query: Tensor, key: Tensor) -> Tensor:
        """[B, Hq, N, blocks]: the largest weight of full attention in each block, as shares of the query's row."""
        logits = (query.unflatten(1, (self.num_kv_heads, -1)) @ key.mT.unsqueeze(2)).flatten(1, 2) * self.head_dim**-0.5
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        weights = logits.masked_fill(later, float("-inf")).softmax(-1)
        largest = (
            pad(weights, (0, -weights.shape[-1] % self.size_of_block)).unflatten(-1, (-1, self.size_of_block)).amax(-1)
        )
        return largest / largest.sum(-1, keepdim=True)
