"""A ByteModel divided over ranks: sequences, heads, and shards of every parameter."""

from typing import Any

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from flexdma.distributed import DynamicMaskAttentionParallel, context_parallel
from flexdma.tools.byte_models.model import ByteModel
from flexdma.tools.demo.ranks import Ranks


def tensor_parallel_plan() -> dict[str, ParallelStyle]:
    """Heads and the widths of MLPs divided; between them tokens are, so that norms work on a part too."""
    return {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "blocks.*.attention_norm": SequenceParallel(),
        "blocks.*.attention": DynamicMaskAttentionParallel(input_layouts=Shard(1), output_layouts=Shard(1)),
        "blocks.*.mlp_norm": SequenceParallel(),
        "blocks.*.mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "blocks.*.mlp.0": ColwiseParallel(),
        "blocks.*.mlp.2": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }


def divide(model: ByteModel, ranks: Ranks, *, backend: str | None) -> None:
    """Divide a model in place.  The order is that of torch's own recipes: heads, sequences, compilation, shards.

    backend: of torch.compile, for each block; None = uncompiled.
    """
    if ranks.tensor is not None:
        parallelize_module(model, ranks.tensor, tensor_parallel_plan())
        # A copy, because compiled blocks get wrong gradients for a tensor whose collective has not finished (torch 2.13).
        model.embedding.register_forward_hook(lambda module, arguments, output: output.clone())
    if ranks.context is not None:
        context_parallel(model, ranks.context)
    for block in model.blocks:
        if backend is not None:
            block.compile(fullgraph=True, dynamic=False, backend=backend)
        fully_shard(block, mesh=ranks.data)
    fully_shard(model, mesh=ranks.data)


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """All weights on the CPU of rank 0; nothing on others.  Every rank calls it."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
