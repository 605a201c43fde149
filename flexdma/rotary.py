"""The rotary embedding (arXiv 2104.09864) of heads, by tables of cosines and sines that the caller makes."""

import torch
from torch import Tensor

from flexdma import checks


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [..., D] in the layout of Llama and Doge, which rotates number n with number n + D / 2."""
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat([-second, first], -1) * sin


def halves_of_pairs(heads: Tensor) -> Tensor:
    """[..., D] whose numbers 2 n and 2 n + 1 are rotated together -> the order of `rotate`: n and n + D / 2."""
    return heads.unflatten(-1, (-1, 2)).mT.flatten(-2)


def rotary_tables(
    position_embeddings: tuple[Tensor, Tensor], hidden_states: Tensor, size: int, name: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cos and sin for heads [B, N, H, D] of hidden states [B, N, hidden_size], each [N, 1, D] or [B, N, 1, D].

    size, name: D, and the name of the argument that gave it, for errors.
    Raises ValueError or TypeError naming the table, or where D is odd.
    """
    for table_name, table in zip(("cos", "sin"), position_embeddings, strict=True):
        leading = hidden_states.shape[2 - (table.dim() - 1) : 2] if table.dim() in (2, 3) else ("N",)
        checks.tensor(f"position_embeddings, {table_name}", table, (*leading, size), hidden_states)
    if size % 2:
        raise ValueError(f"position_embeddings: expected None, as {name} = {size} is odd, got cos and sin")
    cos, sin = (table.unsqueeze(-2).to(dtype) for table in position_embeddings)
    return cos, sin
