"""SeerAttention: a small gate predicts which blocks of the attention matter, distilled from the model's own attention.

Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", arXiv 2410.13276.  For prefill: the pooled
queries of a block read all of its tokens, so a query's blocks depend on later tokens of its own block.
"""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import pad

from flexdma import checks
from flexdma.block_masks.routed import cell_means, routed_block_mask, top_cells
from flexdma.rounding import ceil_div


class SeerGate(nn.Module):
    """Scores of blocks: (pooled queries, projected) . (pooled keys, projected), with rotary positions of blocks.

    num_heads, num_kv_heads, head_dim: of the attention.  gate_size: E, even; None = head_dim.
    block_size: tokens of a block.
    rope_theta: base of the rotary embedding (halves of E rotate) by the position of a block's first token; None = none.

    Queries are pooled by their mean, keys by max, min and mean, as in the paper.  The gate reads queries and keys before
    their rotary embedding.  All sequences of a batch have one length: padding would be pooled with tokens.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        gate_size: int | None = None,
        block_size: int = 64,
        rope_theta: float | None = 10000.0,
    ) -> None:
        super().__init__()
        checks.positive_int("num_kv_heads", num_kv_heads)
        checks.group_size("num_kv_heads", num_kv_heads, num_heads)
        checks.positive_int("block_size", block_size)
        size = head_dim if gate_size is None else gate_size
        checks.positive_int("gate_size", size)
        if size % 2 and rope_theta is not None:
            raise ValueError(f"gate_size: expected an even number with rope_theta, got {size}")
        self.block_size, self.rope_theta = block_size, rope_theta
        self.query_proj = nn.Parameter(torch.empty(num_heads, head_dim, size))
        self.key_proj = nn.Parameter(torch.empty(num_kv_heads, 3 * head_dim, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / inputs."""
        for weight in (self.query_proj, self.key_proj):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores [B, Hq, blocks, blocks] of query [B, Hq, N, D] and key [B, Hkv, N, D]; -inf for later blocks."""
        checks.attention_arguments(query, key, key)
        length = key.shape[2]
        if query.shape[2] != length:
            raise ValueError(f"query: expected {length} tokens as key has, got {query.shape[2]}")
        for name, tensor, weight in (("query", query, self.query_proj), ("key", key, self.key_proj)):
            checks.tensor(name, tensor, ("B", weight.shape[0], "N", self.query_proj.shape[1]))
            if tensor.dtype != weight.dtype and not torch.is_autocast_enabled(tensor.device.type):
                raise TypeError(f"{name}: expected {weight.dtype} as the gate has, got {tensor.dtype}")
        beyond = (0, 0, 0, -length % self.block_size)
        least, most = (
            pad(key, beyond, value=end).unflatten(2, (-1, self.block_size)) for end in (torch.inf, -torch.inf)
        )
        means = [cell_means(tensor, self.block_size).to(tensor.dtype) for tensor in (query, key)]
        rows = means[0] @ self.query_proj
        columns = torch.cat([most.amax(3), least.amin(3), means[1]], -1) @ self.key_proj
        if self.rope_theta is not None:
            rows, columns = (_rotated(tensor, self.block_size, self.rope_theta) for tensor in (rows, columns))
        columns = columns.repeat_interleave(rows.shape[1] // columns.shape[1], 1)
        scores = rows @ columns.mT * rows.shape[-1] ** -0.5
        return scores.masked_fill(_later(scores), float("-inf"))


def seer_block_mask(
    scores: Tensor,
    *,
    length: int,
    block_size: int = 64,
    top_k: int | None = None,
    threshold: float | None = None,
    own_block: bool = True,
) -> BlockMask:
    """The causal mask of the blocks that a gate chooses, for each block of queries.

    scores: [B, Hq, blocks, blocks], of `SeerGate`.  length: N tokens.  block_size: as in the gate.
    top_k: blocks of each row, of equal scores the newer; or threshold: blocks whose softmax over the row is above it.
    own_block: a query always sees its own block, which counts as the first of the top_k.  False follows the published code:
        a row may lose its own block, and a query that sees no key gives 0.

        top_k = 2       blocks  0 1 2
                     queries 0  / . .       / = partial, on the diagonal
                             1  x / .       x = full
                             2  . x /       the best of blocks 0 and 1

    Raises ValueError or TypeError naming the argument.
    """
    checks.positive_int("length", length)
    checks.positive_int("block_size", block_size)
    blocks = ceil_div(length, block_size)
    heads = checks.tensor("scores", scores, ("B", "Hq", blocks, blocks)).shape[1]
    scores = scores.detach().masked_fill(_later(scores), float("-inf"))
    own = torch.eye(blocks, dtype=torch.bool, device=scores.device)
    if threshold is not None and top_k is None:
        chosen = scores.softmax(-1) > threshold
        chosen = chosen | own if own_block else chosen
    elif top_k is not None and threshold is None:
        checks.positive_int("top_k", top_k)
        chosen = top_cells(scores.masked_fill(own, float("inf")) if own_block else scores, top_k)
    else:
        raise ValueError(f"top_k, threshold: expected one of the two, got {top_k} and {threshold}")
    return routed_block_mask(
        chosen, num_query_heads=heads, lengths=(length, length), cells=(block_size, block_size), block_size=block_size
    )


@torch.no_grad()
def seer_target(query: Tensor, key: Tensor, *, block_size: int = 64, scale: float | None = None) -> Tensor:
    """What the gate learns: the largest attention of the full causal model in each block, as shares of each row of blocks.

    query: [B, Hq, N, D], key: [B, Hkv, N, D], as the attention gets them (after rotary embeddings).
    scale: None = D ** -0.5.
    Returns [B, Hq, blocks, blocks], rows sum to 1, float32 (float64 for float64), without a gradient.
    O(N^2 D) time, as the attention; one block of rows at a time, O(block_size N) memory per head.
    """
    checks.attention_arguments(query, key, key)
    checks.positive_int("block_size", block_size)
    (_batch, _heads, length, size), heads = query.shape, key.shape[1]
    if key.shape[2] != length:
        raise ValueError(f"query: expected {key.shape[2]} tokens as key has, got {length}")
    wide = torch.promote_types(query.dtype, torch.float32)
    scale = size**-0.5 if scale is None else scale
    blocks, rows_of_target = ceil_div(length, block_size), []
    for start in range(0, length, block_size):
        end = min(start + block_size, length)
        rows = query[:, :, start:end].to(wide).unflatten(1, (heads, -1))
        logits = (rows @ key[:, :, None, :end].to(wide).mT * scale).flatten(1, 2)
        position = torch.arange(end, device=query.device)
        weights = logits.masked_fill(position > position[start:, None], float("-inf")).softmax(-1)
        largest = pad(weights.amax(2), (0, blocks * block_size - end)).unflatten(-1, (-1, block_size)).amax(-1)
        rows_of_target.append(largest / largest.sum(-1, keepdim=True))
    return torch.stack(rows_of_target, 2)


def seer_loss(scores: Tensor, target: Tensor) -> Tensor:
    """KL(target || softmax(scores)), the mean over rows of blocks; trains the gate.

    scores: [B, Hq, R, blocks], of `SeerGate`.  target: the same shape, of `seer_target`.
    The published code averages over blocks too, which divides by their number, and skips the first quarter of the rows:
    pass `scores[:, :, n:]` and `target[:, :, n:]`.
    """
    checks.tensor("target", target, checks.tensor("scores", scores, ("B", "Hq", "R", "blocks")).shape, scores)
    # Blocks that no query sees have score -inf and target 0.
    log_shares = scores.to(target.dtype).log_softmax(-1).masked_fill(target == 0, 0.0)
    return (torch.xlogy(target, target) - target * log_shares).sum(-1).mean()


def _later(scores: Tensor) -> Tensor:
    """Blocks that lie after the block of queries: bool [blocks, blocks]."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)


def _rotated(rows: Tensor, step: int, theta: float) -> Tensor:
    """The rotary embedding of [B, H, R, E], whose row r is at position r * step."""
    half = rows.shape[-1] // 2
    frequency = theta ** -(torch.arange(half, device=rows.device, dtype=torch.float64) / half)
    angle = step * torch.arange(rows.shape[2], device=rows.device)[:, None] * frequency
    cos, sin = angle.cos().to(rows.dtype), angle.sin().to(rows.dtype)
    first, second = rows.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
