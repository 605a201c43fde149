"""Packed documents: causal attention inside each document, none across documents.

Krell et al., "Efficient Sequence Packing without Cross-contamination", arXiv 2107.02027.
"""

from torch import Tensor

from flexdma import checks
from flexdma.signatures import MaskMod


def document_mask_mod(document_ids: Tensor) -> MaskMod:
    """True where query and key belong to the same document and the key is not later.

    document_ids: [B, K] integers, Q = K.  Combine it with other masks by `torch.nn.attention.flex_attention.and_masks`.
    """
    checks.tensor("document_ids", document_ids, ("B", "K"))

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (document_ids[b, q_idx] == document_ids[b, kv_idx]) & (kv_idx <= q_idx)

    return mask_mod
