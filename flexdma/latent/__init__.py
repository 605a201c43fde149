"""Dynamic Mask Attention over latents: the attention of DeepSeek-V2 and V3 (arXiv 2405.04434) with a bounded state.

layer.py        DynamicMaskLatentAttention
projections.py  from hidden states to queries, latents and rotated keys; the up-projections kept for decoding
attention.py    attention over latents, and the state after it
absorbed.py     one token against latents, without keys and values of heads
"""

from flexdma.latent.layer import DynamicMaskLatentAttention

__all__ = ["DynamicMaskLatentAttention"]
