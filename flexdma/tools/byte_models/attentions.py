"""Four kinds of attention, which differ in the keys that a query sees and in the number added to its logits.

All have the projections, query-key normalisation, rotary embedding and grouped heads of `DynamicMaskAttention`:

    dma           the w best-gated keys; the gate, from the value alone        (the paper, arXiv 2508.02124)
    dma-recency   the w best-gated keys; the same gate and a recency
    full          all earlier keys;      slope_h * j                           (ALiBi, arXiv 2108.12409, slopes learned)
    window        the last w keys;       slope_h * j
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from flexdma import DynamicMaskAttention, Lifespans, causal_top_w, lifespan_attention, sliding_window

KINDS = ("dma", "dma-recency", "full", "window")
RECENCIES = ("slope", "forget")  # of dma-recency


class SlopeGate(nn.Module):
    """The recency term of `ValueGate` with recency="slope", alone: slope_h * j, for any values."""

    def __init__(self, slopes: list[float]) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slopes))

    def forward(self, value: Tensor) -> Tensor:
        """Value [B, Hkv, K, Dv] -> [B, Hkv, K] float64."""
        position = torch.arange(value.shape[2], device=value.device)
        return (self.slope.double()[:, None] * position).expand(value.shape[:3])


class FullAttention(DynamicMaskAttention):
    """Causal attention to all keys, with learned ALiBi slopes."""

    def __init__(self, *sizes: int, slopes: list[float], **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.gate = SlopeGate(slopes)  # type: ignore[assignment]

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        """hidden_states [B, N, hidden_size] -> the same."""
        query, key, value = self.project(hidden_states, position_embeddings)
        output = self.attend(query, key, value, self.gate(value))
        return self.o_proj(output.transpose(1, 2).flatten(2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        """Attention of query [B, Hq, N, D] to all earlier keys."""
        bias = (gate[:1, :, None, :] - gate[:1, :, :, None]).to(query.dtype)
        causal = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
        bias = bias.masked_fill(~causal, float("-inf")).repeat_interleave(self.num_heads // self.num_kv_heads, 1)
        return scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)


class WindowAttention(FullAttention):
    """Attention to the last w keys, with learned ALiBi slopes, by the lowerings of DMA, so that speeds are comparable."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        """Attention of query [B, Hq, N, D] to the last w keys."""
        window = self.policy.widest
        assert window is not None
        lifespans = sliding_window(gate, window)
        return lifespan_attention(query, key, value, lifespans, bias=gate, capacity=window, in_order=True)


def make_attention(
    kind: str, width: int, heads: int, kv_heads: int, window: int, *, recency: str, slopes: list[float]
) -> DynamicMaskAttention:
    """The layer of one of KINDS.

    recency: of dma-recency, one of RECENCIES.  slopes: initial slopes, for kinds with slopes.
    """
    sizes = (width, heads, kv_heads, width // heads, window)
    if kind == "dma":
        return DynamicMaskAttention(*sizes, qk_norm=True, form="exp")
    if kind == "dma-recency":
        initial = slopes if recency == "slope" else None
        return DynamicMaskAttention(*sizes, qk_norm=True, form="exp", recency=recency, slopes=initial)
    return (FullAttention if kind == "full" else WindowAttention)(*sizes, qk_norm=True, slopes=slopes)


def lifespans_of(kind: str, gate: Tensor, window: int) -> Lifespans:
    """The lifespans of keys in a layer of this kind with gates [B, Hkv, K]."""
    if kind == "full":
        return sliding_window(gate, gate.shape[-1])
    return sliding_window(gate, window) if kind == "window" else causal_top_w(gate, window)
