"""Attention on more than one device, by torch.distributed: the part of flexdma that needs a process group.

context_parallel_dynamic_mask_attention     the operator over a sequence that is divided over ranks
shard_positions                             the positions of a rank's tokens, for rotary embeddings
"""

from flexdma.distributed.context_parallel import context_parallel_dynamic_mask_attention, shard_positions

__all__ = ["context_parallel_dynamic_mask_attention", "shard_positions"]
