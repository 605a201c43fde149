"""Dynamic Mask Attention as a layer (arXiv 2508.02124): projections, gate, operator, output projection."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from flexdma import checks
from flexdma.attention import dynamic_mask_attention
from flexdma.gates import ValueGate
from flexdma.lifespans import Selection
from flexdma.mixed_precision import autocast
from flexdma.signatures import ScoreMod
from flexdma.state import State, check_state_matches, empty_state, state_options
from flexdma.state.donation import check_donation
from flexdma.varlen import dynamic_mask_attention_varlen


class DynamicMaskAttention(nn.Module):
    """hidden states [B, N, hidden_size] -> [B, N, hidden_size].

    hidden_size, num_heads (Hq), num_kv_heads (Hkv, divides Hq), head_dim (D), window_size (w): the sizes.
    form, recency, slopes: of the gate, see `ValueGate`.
    selection, sinks, recent, lowering, block_size, kernel_options: of the operator, see `dynamic_mask_attention`.
    qk_norm: root-mean-square normalisation of each query and key head before the rotary embedding (arXiv 2010.04245).
    bias: whether the projections q_proj, k_proj, v_proj and o_proj have a bias.

    There is no attention dropout.  Parameters: q_proj, k_proj, v_proj, o_proj, gate.A, gate.dt_proj, ..., and with qk_norm
    q_norm and k_norm.  Raises ValueError where num_kv_heads does not divide num_heads or a size is below 1.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window_size: int | Sequence[int] | None,
        *,
        form: str = "exp",
        recency: str | None = None,
        slopes: Sequence[float] | None = None,
        selection: str = "causal",
        sinks: int = 0,
        recent: int = 0,
        qk_norm: bool = False,
        bias: bool = False,
        lowering: str | None = None,
        block_size: int | tuple[int, int] | None = None,
        kernel_options: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("num_heads", num_heads), ("num_kv_heads", num_kv_heads),
                           ("head_dim", head_dim)):  # fmt: skip
            checks.positive_int(name, size)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads: expected a multiple of num_kv_heads = {num_kv_heads}, got {num_heads}")
        checks.one_of("lowering", lowering, (None, *checks.LOWERINGS))
        self.policy = Selection.of(selection, window_size, sinks, recent, heads=num_kv_heads)
        self.hidden_size = hidden_size
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.lowering, self.block_size, self.kernel_options = lowering, block_size, kernel_options
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.gate = ValueGate(num_kv_heads, head_dim, form, recency, slopes=slopes)

    def extra_repr(self) -> str:
        how = {"lowering": self.lowering, "block_size": self.block_size, "kernel_options": self.kernel_options}
        options = state_options(self.policy) | how
        return ", ".join(f"{name}={value!r}" for name, value in options.items() if value not in (None, 0))

    @overload
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
        return_state: Literal[False] = False,
        donate: bool = False,
    ) -> Tensor: ...

    @overload
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
        return_state: Literal[True],
        donate: bool = False,
    ) -> tuple[Tensor, State]: ...

    @overload
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
        return_state: bool,
        donate: bool = False,
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
        before: dict[str, Any] = {}
        if cu_seqlens is not None:
            _refuse_beside_sequences(key_padding_mask=key_padding_mask, document_ids=document_ids, state=state)
            check_donation(donate, state, return_state)
            attend = partial(_attend_sequences, cu_seqlens=cu_seqlens)
            before = {"cu_seqlens": cu_seqlens}
        if state is not None:
            check_state_matches(state, key, value, self._gate_dtype, self.policy)
            before = {"first_position": state.real_length, "forgotten": state.forgotten}
        returns_forgotten = return_state and self.gate.recency == "forget"
        gate = self.gate(value, key_padding_mask=key_padding_mask, return_forgotten=returns_forgotten, **before)
        if returns_forgotten:
            gate, forgotten = gate
        policy = self.policy
        result = attend(
            query, key, value, gate, window_size=policy.window_size, selection=policy.kind, sinks=policy.sinks,
            recent=policy.recent, key_padding_mask=key_padding_mask, document_ids=document_ids, score_mod=score_mod,
            state=state, return_state=return_state, donate=donate, lowering=self.lowering, block_size=self.block_size,
            kernel_options=self.kernel_options,
        )  # fmt: skip
        if not isinstance(result, tuple):
            return self._joined(result)
        output, after = result
        return self._joined(output), after._with(forgotten=forgotten) if returns_forgotten else after

    def _joined(self, output: Tensor) -> Tensor:
        return self.o_proj(output.transpose(1, 2).flatten(2))

    def empty_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        """The state of this layer before the first token.

        dtype: of keys and values; default autocast's where it is enabled, else that of v_proj's parameters, or of `gate.A`
            where v_proj has none in floating point (quantised weights).
        device: default that of `gate.A`.  Raises ValueError where that is meta, as offloaded weights are between calls; pass
            "meta" for a state without numbers.
        """
        if device is None and self.gate.A.is_meta:
            raise ValueError(
                "device: expected the device that this layer computes on, as its weights are on meta, got None"
            )
        device = torch.device(self.gate.A.device if device is None else device)
        if dtype is None:
            # Not the gate's dtype, which may be float32 in a layer of lower precision.
            dtypes = (p.dtype for p in self.v_proj.parameters() if p.is_floating_point())
            dtype = autocast(torch.empty(0, dtype=next(dtypes, self.gate.A.dtype), device=device))[0].dtype
        return empty_state(
            self.policy,
            batch_size,
            self.num_kv_heads,
            self.head_dim,
            dtype=dtype,
            device=device,
            gate_dtype=self._gate_dtype,
        )

    @property
    def _gate_dtype(self) -> torch.dtype:
        return torch.float32 if self.gate.recency is None else torch.float64

    def project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, Hq, N, D], key and value [B, Hkv, N, D] for the operator; query and key normalised and rotated."""
        checks.tensor("hidden_states", hidden_states, ("B", "N", self.hidden_size))
        query = self.q_norm(self.q_proj(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)))
        key = self.k_norm(self.k_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim)))
        value = self.v_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if position_embeddings is not None:
            for name, table in zip(("cos", "sin"), position_embeddings, strict=True):
                leading = hidden_states.shape[2 - (table.dim() - 1) : 2] if table.dim() in (2, 3) else ("N",)
                checks.tensor(f"position_embeddings, {name}", table, (*leading, self.head_dim), hidden_states)
            if self.head_dim % 2:
                raise ValueError(
                    f"position_embeddings: expected None, as head_dim = {self.head_dim} is odd, got cos and sin"
                )
            cos, sin = (t.unsqueeze(-2).to(query.dtype) for t in position_embeddings)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _refuse_beside_sequences(**others: object) -> None:
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name}: expected None with cu_seqlens, got a {type(value).__name__}")


def _attend_sequences(
    *tensors: Tensor,
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
    query, key, value, gate = (tensor[0].transpose(0, 1) for tensor in tensors)  # [T, H, ...]
    result = dynamic_mask_attention_varlen(
        query, key, value, gate, cu_seqlens, window_size=window_size, return_state=return_state, **options
    )
    if isinstance(result, tuple):
        return result[0].transpose(0, 1)[None], result[1]
    return result.transpose(0, 1)[None]


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [..., D] in the layout of Llama and Doge, which rotates number n with number n + D / 2."""
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat([-second, first], -1) * sin
