"""`DynamicMaskAttention` over a sequence that is divided over ranks: its gates count tokens of earlier ranks too."""

from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from flexdma.attention_layer import KeyGates
from flexdma.distributed.agreement import refuse_other_mesh, same_on_all_ranks
from flexdma.distributed.context_parallel_attention import context_parallel_dynamic_mask_attention
from flexdma.distributed.prefix_scan import sum_of_earlier_ranks
from flexdma.mixed_precision import autocast
from flexdma.modules import DynamicMaskAttention
from flexdma.signatures import ScoreMod
from flexdma.state import State
from flexdma.transforms import needs_gradient

Module = TypeVar("Module", bound=nn.Module)


class ContextParallelDynamicMaskAttention(DynamicMaskAttention):
    """A `DynamicMaskAttention` that `context_parallel` has changed: it attends over the whole sequence of `mesh`."""

    mesh: DeviceMesh

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mesh={self.mesh}"

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        score_mod: ScoreMod | None = None,
        return_state: bool = False,
        **refused: Any,
    ) -> Tensor | tuple[Tensor, State]:
        """Causal self-attention over this rank's tokens and those of earlier ranks.

        hidden_states [B, n, hidden_size], key_padding_mask and document_ids [B, n]: of this rank's n tokens.
        position_embeddings: cos and sin at the positions of these tokens in the whole sequence, see `shard_positions`.
        Others as in `context_parallel_dynamic_mask_attention`.  cu_seqlens, state and donate raise ValueError.

        Returns [B, n, hidden_size], or (that, DynamicMaskState) with return_state.
        """
        for name, given in refused.items():
            if name not in ("cu_seqlens", "state", "donate"):
                raise TypeError(f"{name}: no argument of forward")
            if given is not None and given is not False:
                instead = "document_ids" if name == "cu_seqlens" else "return_state on the last rank"
                raise ValueError(
                    f"{name}: expected None over several ranks (use {instead}), got {type(given).__name__}"
                )
        query, key, value = autocast(*self.project(hidden_states, position_embeddings))
        gate, bias, forgotten = self._gates_over_ranks(value, key_padding_mask)
        policy = self.policy
        result = context_parallel_dynamic_mask_attention(
            query, key, value, gate, bias=bias, window_size=policy.window_size, mesh=self.mesh, selection=policy.kind,
            sinks=policy.sinks, recent=policy.recent, key_padding_mask=key_padding_mask, document_ids=document_ids,
            score_mod=score_mod, return_state=return_state, lowering=self.lowering, block_size=self.block_size,
            kernel_options=self.kernel_options,
        )  # fmt: skip
        if not isinstance(result, tuple):
            return self._joined(result, hidden_states)
        output, state = result
        return self._joined(output, hidden_states), state if forgotten is None else replace(state, forgotten=forgotten)

    def _gates_over_ranks(self, value: Tensor, key_padding_mask: Tensor | None) -> KeyGates:
        """The gates [B, Hkv, n] of this rank's tokens; with recency="forget" the sum of -logsigmoid to the last token."""
        if self.gate is None:
            return KeyGates()
        recency, mesh = self.gate.recency, self.mesh
        if recency is None:
            return self._called_gate(value, key_padding_mask, False)
        refuse_other_mesh(mesh, hidden_states=value)
        options = {"recency": recency, "gate requires a gradient": needs_gradient(value, *self.gate.parameters())}
        sizes = {"hidden_states.shape[0]": value.shape[0], "num_kv_heads": value.shape[1]}
        value = same_on_all_ranks(value, options, sizes, mesh)
        if recency == "slope":
            batch, _, tokens, _ = value.shape
            real = torch.full((batch,), tokens, device=value.device)
            if key_padding_mask is not None:
                real = key_padding_mask.sum(-1)
            before = sum_of_earlier_ranks(real, mesh)
            return self._called_gate(value, key_padding_mask, False, first_position=before)
        gate, bias, total = self._called_gate(value, key_padding_mask, True)
        assert gate is not None
        assert total is not None
        before = sum_of_earlier_ranks(total, mesh)
        if bias is None:
            return KeyGates(gate + before[..., None], None, before + total)
        return KeyGates(gate, bias + before[..., None], before + total)


def context_parallel(module: Module, mesh: DeviceMesh) -> Module:
    """Change each `DynamicMaskAttention` in `module` (or the module itself) to attend over the sequence of `mesh`.

    module: changed in place and returned; names and values of parameters stay, also in `state_dict`.
    mesh: of one dimension, the ranks in order of the sequence; mesh["cp"] of a larger one.

    The layers then take the tokens of one rank, see `ContextParallelDynamicMaskAttention.forward`.  The gradients of
    parameters are those of this rank's outputs: sum them over the mesh.  DDP and fully_shard average them instead, so
    multiply the loss by the number of ranks.  Call it before DDP, fully_shard and torch.compile.
    Raises ValueError where no layer is found or a layer's selection has no bound, TypeError for a subclass, whose own
    forward would not reach other ranks.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, DynamicMaskAttention)]
    if not layers:
        raise ValueError(f"module: expected a DynamicMaskAttention or a module with some, got {type(module).__name__}")
    for layer in layers:
        if type(layer) not in (DynamicMaskAttention, ContextParallelDynamicMaskAttention):
            raise TypeError(f"module: expected layers of type DynamicMaskAttention, got {type(layer).__name__}")
        layer.policy.refuse_without_bound("over several ranks")
    refuse_other_mesh(mesh)
    for layer in layers:
        layer.__class__ = ContextParallelDynamicMaskAttention
        cast(ContextParallelDynamicMaskAttention, layer).mesh = mesh
    return module
