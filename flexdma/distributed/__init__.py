"""Attention on more than one device, by torch.distributed: the part of flexdma that needs a process group.

context_parallel_dynamic_mask_attention     the operator over a sequence that is divided over ranks
context_parallel, ContextParallelDynamicMaskAttention   the same for layers; shard_positions: for rotary embeddings
DynamicMaskAttentionParallel, ValueGateParallel     the heads of a layer divided over ranks, plans for `parallelize_module`
"""

from flexdma.distributed.context_parallel_attention import context_parallel_dynamic_mask_attention, shard_positions
from flexdma.distributed.context_parallel_layer import ContextParallelDynamicMaskAttention, context_parallel
from flexdma.distributed.tensor_parallel import DynamicMaskAttentionParallel, ValueGateParallel

__all__ = [
    "ContextParallelDynamicMaskAttention",
    "DynamicMaskAttentionParallel",
    "ValueGateParallel",
    "context_parallel",
    "context_parallel_dynamic_mask_attention",
    "shard_positions",
]
