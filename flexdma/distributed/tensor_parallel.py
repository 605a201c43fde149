"""Tensor parallelism: the heads of a layer divided over the ranks of a mesh, as plans for `parallelize_module`.

    parallelize_module(model, mesh["tensor"], {"layers.*.attention": DynamicMaskAttentionParallel()})

The cut is Megatron's (arXiv 1909.08053): q_proj, k_proj, v_proj and g_proj, the gate of the output, by columns, o_proj by
rows; each rank has Hq / P query heads and Hkv / P KV heads.  Selection, attention and state of a KV head concern no other
head.  Only the gate of keys needs more: its projection reads the values of all heads.  Three exact ways, in numbers that a
rank sends for B x N positions and P ranks:

    gather the values                      B N Hkv Dv (P - 1) / P, and a reduce-scatter of as many in the backward pass
    compute all values on every rank       none, but P times the work of v_proj, whose weight is then not sharded
    cut the projection by rows (this one)  B N Hkv (P - 1) / P, and as many in the backward pass

By rows, each rank projects the values of its own heads to Hkv partial sums.  A reduce-scatter adds them and leaves each rank
the sums of its own heads.  That is Dv times less than gathering the values, and hidden_size / Hkv times less than the
reduction after o_proj.  A projection of the hidden states by the product of both weights would need no communication, but the
product needs the whole weight of v_proj, and rounds differently in 16 bits.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement

from flexdma.gates import ValueGate
from flexdma.modules import DynamicMaskAttention
from flexdma.signatures import ScoreMod


class ValueGateParallel(ParallelStyle):
    """Divides the KV heads of a `ValueGate` over the ranks: values [B, Hkv / P, K, Dv] -> gates [B, Hkv / P, K].

    Parameters: A and slope are sharded by heads, dt_proj.weight and forget_proj.weight by the values that they read; biases
    are replicated.  `forgotten` is [B, Hkv / P] too.
    Communication: one reduce-scatter of B K Hkv numbers in the dtype of A, two with recency="forget".
    Raises ValueError where P does not divide num_kv_heads.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        gate = _checked(module, ValueGate)
        own = _own_heads("num_kv_heads", gate.num_kv_heads, device_mesh)
        for name in ("A", "slope"):
            if hasattr(gate, name):
                whole = getattr(gate, name)
                sharded = distribute_tensor(whole, device_mesh, [Shard(0)], src_data_rank=self.src_data_rank)
                gate.register_parameter(name, nn.Parameter(sharded, requires_grad=whole.requires_grad))
        by_rows: dict[str, ParallelStyle] = {
            name: RowwiseParallel(output_layouts=Shard(-1)) for name, _ in gate.named_children()
        }
        parallelize_module(gate, device_mesh, by_rows, src_data_rank=self.src_data_rank)
        gate.num_kv_heads, gate.is_divided = own, True
        return gate


class DynamicMaskAttentionParallel(ParallelStyle):
    """Divides the heads of a `DynamicMaskAttention` over the ranks.

    input_layouts: of hidden_states [B, N, hidden_size] given as a plain tensor: Replicate(), the default, or Shard(1) after a
        norm under sequence parallelism (arXiv 2205.05198); then N is a multiple of P.  A DTensor has its own layout.
    output_layouts: of the output, Replicate() (default) or Shard(1).
    use_local_output: return a plain tensor, not a DTensor.

    Other arguments are those of the whole sequence, the same on all ranks: position_embeddings, key_padding_mask,
    document_ids, cu_seqlens.  A score_mod gets the head's number among all Hq.  States hold the KV heads of the rank, and
    nothing is communicated for them.  Afterwards num_heads, num_kv_heads and windows per head are those of the rank.
    Communication, forward: a reduction of B N hidden_size numbers after o_proj (an all-reduce; with Shard(1) a
    reduce-scatter, and an all-gather before q_proj), and the gate's (`ValueGateParallel`).
    Raises ValueError where P does not divide num_heads or num_kv_heads, or the layer is sharded already.
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        self.input_layouts, self.output_layouts = input_layouts or Replicate(), output_layouts or Replicate()
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer = _checked(module, DynamicMaskAttention)
        heads = _own_heads("num_heads", layer.num_heads, device_mesh)
        kv_heads = _own_heads("num_kv_heads", layer.num_kv_heads, device_mesh)
        rank = device_mesh.get_local_rank()
        plan: dict[str, ParallelStyle] = {
            **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ColwiseParallel()),
            "o_proj": RowwiseParallel(output_layouts=self.output_layouts, use_local_output=self.use_local_output),
        }
        if layer.gate is not None:
            plan["gate"] = ValueGateParallel()
        if layer.g_proj is not None:
            plan["g_proj"] = ColwiseParallel()
        parallelize_module(layer, device_mesh, plan, src_data_rank=self.src_data_rank)
        for norm in (layer.q_norm, layer.k_norm):
            # The same weight for the heads of all ranks, so its gradient is a sum over ranks.
            distribute_module(norm, device_mesh, None, _heads_sharded, _local)
        layer.num_heads, layer.num_kv_heads = heads, kv_heads
        if isinstance(layer.window_size, tuple):
            layer.window_size = layer.window_size[rank * kv_heads : (rank + 1) * kv_heads]
        prepare = partial(_prepared, device_mesh, self.input_layouts, rank * heads)
        layer.register_forward_pre_hook(prepare, with_kwargs=True)
        return layer


def _checked(module: nn.Module, kind: type) -> Any:
    if not isinstance(module, kind):
        raise TypeError(f"parallelize_plan: expected a {kind.__name__} at this name, got a {type(module).__name__}")
    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{name}: expected a whole parameter, got a sharded one; apply this plan once, before fully_shard"
            )
    return module


def _own_heads(name: str, heads: int, mesh: DeviceMesh) -> int:
    if heads % mesh.size():
        raise ValueError(f"{name}: expected a multiple of the {mesh.size()} ranks of the mesh, got {heads}")
    return heads // mesh.size()


def _heads_sharded(module: nn.Module, inputs: tuple[Tensor], mesh: DeviceMesh) -> Any:
    """[B, N, H / P, D] of this rank as [B, N, H, D] of all."""
    return DTensor.from_local(inputs[0], mesh, [Shard(2)], run_check=False)


def _local(module: nn.Module, output: DTensor, mesh: DeviceMesh) -> Any:
    return output.to_local()


def _prepared(
    mesh: DeviceMesh,
    layout: Placement,
    first_head: int,
    layer: nn.Module,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with hidden states that every rank has whole, and a score_mod that gets the head's number among all Hq.

    One DTensor for the three projections: the sum of their gradients is then reduced once.
    """
    if not arguments:
        options = {**options}
        arguments = (options.pop("hidden_states"),)
    hidden, *rest = arguments
    if not isinstance(hidden, DTensor):
        hidden = DTensor.from_local(hidden, mesh, [layout], run_check=False)
    hidden = hidden.redistribute(placements=[Replicate()])
    if options.get("score_mod") is not None:
        options = {**options, "score_mod": _at_heads(options["score_mod"], first_head)}
    return (hidden, *rest), options


def _at_heads(score_mod: ScoreMod, first: int) -> ScoreMod:
    def shifted(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score_mod(score, b, h + first, i, j)

    return shifted
