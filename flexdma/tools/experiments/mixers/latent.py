"""Mixers that are multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), full and with gates."""

from typing import Any

import torch
from torch import Tensor

from flexdma.latent import DynamicMaskLatentAttention
from flexdma.tools.experiments.mixers.layers import Make
from flexdma.tools.experiments.mixers.mixer import ModelSizes


class LatentMixer(DynamicMaskLatentAttention):
    """A head's keys have D / 2 numbers of their own and D / 2 rotated ones that all heads share; a latent has D numbers."""

    def __init__(self, sizes: ModelSizes, window: int | None, **options: Any) -> None:
        half = sizes.head_dim // 2
        super().__init__(
            sizes.width, sizes.heads, window, kv_lora_rank=sizes.head_dim, qk_nope_head_dim=half, qk_rope_head_dim=half,
            v_head_dim=sizes.head_dim, **options,
        )  # fmt: skip

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        """position_embeddings: of the whole head, [N, D]."""
        cos, sin = (_of_half(table) for table in position_embeddings)
        return super().forward(hidden_states, (cos, sin))


def latent(**options: Any) -> Make:
    """All earlier latents."""
    return lambda sizes: LatentMixer(sizes, None, selection="full", **options)


def dynamic_latent(**options: Any) -> Make:
    """The w best-gated latents, the same ones for all heads."""
    return lambda sizes: LatentMixer(sizes, sizes.window, **options)


def _of_half(table: Tensor) -> Tensor:
    """Tables of D numbers -> those of D / 2, whose frequencies are every other one."""
    frequencies = table[..., : table.shape[-1] // 2 : 2]
    return torch.cat([frequencies, frequencies], -1)
