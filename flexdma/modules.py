"""Dynamic Mask Attention as a layer (arXiv 2508.02124): projections, gate, operator, output projection."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from flexdma import checks
from flexdma.attention import dynamic_mask_attention
from flexdma.attention_layer import AttentionLayer, refuse_beside_sequences
from flexdma.lifespans import Selection
from flexdma.mixed_precision import autocast
from flexdma.rotary import rotary_tables, rotate
from flexdma.signatures import LayerOptions, ScoreMod
from flexdma.state import State, check_state_matches
from flexdma.state.donation import check_donation
from flexdma.varlen import dynamic_mask_attention_varlen


class DynamicMaskAttention(AttentionLayer):
    """hidden states [B, N, hidden_size] -> [B, N, hidden_size].

    hidden_size, num_heads (Hq), num_kv_heads (Hkv, divides Hq), head_dim (D), window_size (w): the sizes.  Hq * D need not
        be hidden_size: fewer query heads are Sparse Query Attention (arXiv 2510.01817).
    form, recency, slopes: of the gate, see `ValueGate`.
    recency_ranks: False = a recency is added to the logits and keys are ranked without it.  A recency in the gate (True)
        makes the choice a window where slopes or forget gates outgrow A, and far keys are lost; with False give `recent`, as
        w / 4, so that the newest keys are visible whatever their gates.
    selection, sinks, recent, lowering, block_size, kernel_options: of the operator, see `dynamic_mask_attention`.  With
        selection="sliding" or "full" (then window_size is None) the layer has no gate: `gate` is None.
    qk_norm: root-mean-square normalisation of each query and key head before the rotary embedding (arXiv 2010.04245).
    output_gate: multiply the output of each head by sigmoid(g_proj(hidden states)), before o_proj (Gated Attention, arXiv
        2505.06708).
    bias: whether the projections q_proj, k_proj, v_proj, o_proj and g_proj have a bias.

    There is no attention dropout.  Parameters: q_proj, k_proj, v_proj, o_proj, gate.A, gate.dt_proj, ..., with qk_norm
    q_norm and k_norm, with output_gate g_proj.
    Raises ValueError where num_kv_heads does not divide num_heads, a size is below 1, or the gate's arguments are given for
    a selection without one.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window_size: int | Sequence[int] | None,
        *,
        form: str = "identity",
        recency: str | None = None,
        slopes: Sequence[float] | None = None,
        recency_ranks: bool = True,
        selection: str = "causal",
        sinks: int = 0,
        recent: int = 0,
        qk_norm: bool = False,
        output_gate: bool = False,
        bias: bool = False,
        lowering: str | None = None,
        block_size: int | tuple[int, int] | None = None,
        kernel_options: Mapping[str, object] | None = None,
    ) -> None:
        for name, size in (("hidden_size", hidden_size), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads),
                           ("head_dim", head_dim)):  # fmt: skip
            checks.positive_int(name, size)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads: expected a multiple of num_kv_heads = {num_kv_heads}, got {num_heads}")
        policy = Selection.of(selection, window_size, sinks, recent, heads=num_kv_heads)
        super().__init__(policy, lowering, block_size, kernel_options)
        self.hidden_size = hidden_size
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self._make_gate(num_kv_heads, head_dim, form, recency, slopes, recency_ranks)
        self._make_output_gate(output_gate, hidden_size, num_heads * head_dim, bias)

    @overload
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        state: State | None = None,
        return_state: Literal[False] = False,
        **options: Unpack[LayerOptions],
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        state: State | None = None,
        return_state: Literal[True],
        **options: Unpack[LayerOptions],
    ) -> tuple[Tensor, State]: ...

    @overload
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        state: State | None = None,
        return_state: bool,
        **options: Unpack[LayerOptions],
    ) -> Tensor | tuple[Tensor, State]: ...

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        score_mod: ScoreMod | None = None,
        state: State | None = None,
        return_state: bool = False,
        donate: bool = False,
    ) -> Tensor | tuple[Tensor, State]:
        """Causal self-attention over the N tokens and the earlier ones of `state`.

        position_embeddings: cos and sin of the rotary embedding (arXiv 2104.09864), each [N, D] or [B, N, D], the halves
            repeated; None for no rotation.
        key_padding_mask, document_ids [B, N], score_mod: as in `dynamic_mask_attention`.
        cu_seqlens: [S + 1], 0 and the ends of S sequences packed into one row (B = 1), each attended to alone, as in
            `dynamic_mask_attention_varlen`.  Raises with key_padding_mask, document_ids, state and donate.
        state, return_state, donate: as in `dynamic_mask_attention`; `empty_state` makes the first state.

        Returns [B, N, hidden_size], or (that, DynamicMaskState or GrowingState) with return_state.
        """
        query, key, value = autocast(*self.project(hidden_states, position_embeddings))
        attend: Callable[..., Any] = dynamic_mask_attention
        if cu_seqlens is not None:
            refuse_beside_sequences(key_padding_mask=key_padding_mask, document_ids=document_ids, state=state)
            check_donation(donate, state, return_state)
            attend = partial(_attend_sequences, cu_seqlens=cu_seqlens)
        if state is not None:
            check_state_matches(state, key, value, self._gate_dtype, self.policy, self._bias_dtype)
        gate, bias, forgotten = self._gates(value, key_padding_mask, cu_seqlens, state, return_state)
        policy = self.policy
        result = attend(
            query, key, value, gate, bias=bias, window_size=policy.window_size, selection=policy.kind, sinks=policy.sinks,
            recent=policy.recent, key_padding_mask=key_padding_mask, document_ids=document_ids, score_mod=score_mod,
            state=state, return_state=return_state, donate=donate, lowering=self.lowering, block_size=self.block_size,
            kernel_options=self.kernel_options,
        )  # fmt: skip
        if not isinstance(result, tuple):
            return self._joined(result, hidden_states)
        output, after = result
        after = after if forgotten is None else after._with(forgotten=forgotten)
        return self._joined(output, hidden_states), after

    def empty_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        """The state of this layer before the first token.

        dtype: of keys and values; default autocast's where it is enabled, else that of v_proj's parameters, or of `gate.A`
            where v_proj has none in floating point (quantised weights).
        device: default that of `gate.A`.  Raises ValueError where that is meta, as offloaded weights are between calls; pass
            "meta" for a state without numbers.  A layer without a gate takes its first parameter instead of `gate.A`.
        """
        size = self.head_dim
        return self._empty_state(batch_size, self.num_kv_heads, size, size, self.v_proj, dtype, device)

    def project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, Hq, N, D], key and value [B, Hkv, N, D] for the operator; query and key normalised and rotated."""
        checks.tensor("hidden_states", hidden_states, ("B", "N", self.hidden_size))
        query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)))
        key = self.k_norm(self.k_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim)))
        value = self.v_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if position_embeddings is not None:
            cos, sin = rotary_tables(position_embeddings, hidden_states, self.head_dim, "head_dim", query.dtype)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _attend_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    *,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    window_size: int | tuple[int, ...] | None,
    return_state: bool,
    key_padding_mask: None,
    document_ids: None,
    state: None,
    donate: bool,
    **options: Any,
) -> Tensor | tuple[Tensor, State]:
    """`dynamic_mask_attention` of query [1, Hq, T, D], key, value and gate [1, Hkv, T], each sequence alone."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, H, D]
    gate, bias = (None if numbers is None else numbers[0].transpose(0, 1) for numbers in (gate, bias))
    result = dynamic_mask_attention_varlen(
        query, key, value, gate, cu_seqlens, bias=bias, window_size=window_size, return_state=return_state, **options
    )
    if isinstance(result, tuple):
        return result[0].transpose(0, 1)[None], result[1]
    return result.transpose(0, 1)[None]
