"""DynamicMaskLatentAttention: latents of tokens, a gate of each latent, and attention to the w best-gated ones."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from flexdma import checks
from flexdma.attention_layer import refuse_beside_sequences
from flexdma.latent.absorbed import absorbed_attention
from flexdma.latent.projections import LatentProjections
from flexdma.lifespans import Lifespans, Selection
from flexdma.lowerings.attend import attend
from flexdma.mixed_precision import autocast
from flexdma.sequences import Sequences, packed_sequences
from flexdma.signatures import LayerOptions, ScoreMod
from flexdma.state import DynamicMaskState, check_state_matches
from flexdma.state.carry import Keys, first_keys, score_mod_at_positions, state_after, with_state_keys
from flexdma.state.decoding import state_after_token
from flexdma.state.donation import check_donation
from flexdma.state.packed import states_after
from flexdma.varlen import capacity_of_sequences, score_mod_in_sequences


class DynamicMaskLatentAttention(LatentProjections):
    """hidden states [B, N, hidden_size] -> [B, N, hidden_size] by multi-head latent attention (arXiv 2405.04434).

    hidden_size, num_heads (H), window_size (w): the sizes.
    kv_lora_rank (r): of the latent, from which all heads compute keys and values.  q_lora_rank: of the query's; None = the
        query is projected from the hidden states.
    qk_nope_head_dim (dn), qk_rope_head_dim (dr), v_head_dim (dv): a key has dn numbers of its head and dr rotated ones that
        all heads share, a value has dv.  The defaults are DeepSeek-V3's: D = 192, Dv = 128.
    rope_interleave: the projections give the numbers that are rotated together side by side (2 n with 2 n + 1), as those of
        DeepSeek's checkpoints do.  False: n and n + dr / 2.
    scale: default (dn + dr) ** -0.5.  norm_eps: of both normalisations of latents.
    form, recency, slopes: of the gate, see `ValueGate`.  It reads the latent.  One gate per token serves all heads, so that
        all heads see the same w latents, and the state holds each once.
    selection, sinks, recent, lowering, block_size, kernel_options: as in `DynamicMaskAttention`.  w is one int.
    output_gate: as in `DynamicMaskAttention`.
    bias: whether q_a_proj, kv_a_proj_with_mqa, o_proj and g_proj have a bias.

    Several tokens are computed with keys and values of each head.  One token with a state is computed in the absorbed form,
    which never makes those (`absorb`).
    Parameters: named as in DeepSeek-V3's checkpoints (q_proj or q_a_proj, q_a_layernorm, q_b_proj; kv_a_proj_with_mqa,
    kv_a_layernorm, kv_b_proj, o_proj), and gate.A, gate.dt_proj, ....  Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window_size: int | None,
        *,
        kv_lora_rank: int = 512,
        q_lora_rank: int | None = None,
        qk_nope_head_dim: int = 128,
        qk_rope_head_dim: int = 64,
        v_head_dim: int = 128,
        rope_interleave: bool = False,
        scale: float | None = None,
        norm_eps: float = 1e-6,
        form: str = "exp",
        recency: str | None = None,
        slopes: Sequence[float] | None = None,
        selection: str = "causal",
        sinks: int = 0,
        recent: int = 0,
        output_gate: bool = False,
        bias: bool = False,
        lowering: str | None = None,
        block_size: int | tuple[int, int] | None = None,
        kernel_options: Mapping[str, object] | None = None,
    ) -> None:
        sizes = {
            "hidden_size": hidden_size, "num_heads": num_heads, "kv_lora_rank": kv_lora_rank,
            "qk_nope_head_dim": qk_nope_head_dim, "qk_rope_head_dim": qk_rope_head_dim, "v_head_dim": v_head_dim,
            **({} if q_lora_rank is None else {"q_lora_rank": q_lora_rank}),
        }  # fmt: skip
        for name, size in sizes.items():
            checks.positive_int(name, size)
        checks.scores(scale, None)
        super().__init__(
            Selection.of(selection, window_size, sinks, recent, heads=1), lowering, block_size, kernel_options
        )
        self.hidden_size, self.num_heads, self.kv_lora_rank = hidden_size, num_heads, kv_lora_rank
        self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.rope_interleave = rope_interleave
        size = qk_nope_head_dim + qk_rope_head_dim
        self.scale = size**-0.5 if scale is None else scale
        self._make_projections(q_lora_rank, bias, norm_eps)
        self._make_gate(1, kv_lora_rank, form, recency, slopes)
        self._make_output_gate(output_gate, hidden_size, num_heads * v_head_dim, bias)

    @overload
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        state: DynamicMaskState | None = None,
        return_state: Literal[False] = False,
        **options: Unpack[LayerOptions],
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        state: DynamicMaskState | None = None,
        return_state: Literal[True],
        **options: Unpack[LayerOptions],
    ) -> tuple[Tensor, DynamicMaskState]: ...

    @overload
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        state: DynamicMaskState | None = None,
        return_state: bool,
        **options: Unpack[LayerOptions],
    ) -> Tensor | tuple[Tensor, DynamicMaskState]: ...

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        score_mod: ScoreMod | None = None,
        state: DynamicMaskState | None = None,
        return_state: bool = False,
        donate: bool = False,
    ) -> Tensor | tuple[Tensor, DynamicMaskState]:
        """Causal self-attention over the N tokens and the earlier ones of `state`.

        position_embeddings: cos and sin of the rotary embedding, each [N, dr] or [B, N, dr], the halves repeated (also with
            rope_interleave); None for no rotation.
        Others as in `DynamicMaskAttention.forward`.  The state's key is the rotated key [B, 1, C, dr], its value the latent
        [B, 1, C, r].

        Returns [B, N, hidden_size], or (that, DynamicMaskState) with return_state.
        """
        query_nope, query_rope, key, latent = autocast(*self.project(hidden_states, position_embeddings))
        check_donation(donate, state, return_state, query_nope, query_rope, key, latent)
        checks.scores(None, score_mod)
        sequences = None
        if cu_seqlens is not None:
            refuse_beside_sequences(key_padding_mask=key_padding_mask, document_ids=document_ids, state=state)
            sequences = packed_sequences(cu_seqlens, latent.shape[2], latent)
            document_ids = sequences.number[None]
            score_mod = None if score_mod is None else score_mod_in_sequences(score_mod, sequences)
        if state is not None or return_state:
            self.policy.refuse_without_state()
        if state is not None:
            check_state_matches(state, key, latent, self._gate_dtype, self.policy)
        gates, forgotten = self._gates(latent, key_padding_mask, cu_seqlens, state, return_state)
        gate = self.policy.gates(gates, key)
        masks: dict[str, Any] = {"key_padding_mask": key_padding_mask, "document_ids": document_ids}
        checks.selected_keys(gate, **masks)
        after = None
        if (
            state is not None
            and latent.shape[2] == 1
            and self.lowering is self.block_size is self.kernel_options is None
        ):
            after = state_after_token(key, latent, gate, state, **masks, donate=donate)
            up = self._up_projections(latent)
            output = absorbed_attention(query_nope, query_rope, state.length, after, up, self.scale, score_mod)
        else:
            if state is None:
                keys = first_keys(key, latent, gate, **masks)
            else:
                keys = with_state_keys(state, key, latent, gate, **masks)
                if score_mod is not None:
                    score_mod = score_mod_at_positions(score_mod, keys, state.length, self.num_heads)
            lifespans = self.policy.lifespans(
                keys.gate, key_padding_mask=keys.key_padding_mask, document_ids=keys.document_ids
            )
            query = torch.cat([query_nope, query_rope], -1)
            output = self._expanded(query, keys, gates is not None, lifespans, score_mod, sequences)
            if return_state and sequences is not None:
                after = states_after(key, latent, gate, lifespans, sequences, self.policy)
            elif return_state:
                before = self.empty_state(latent.shape[0], latent.dtype, latent.device) if state is None else state
                after = state_after(before, keys, lifespans)
        joined = self._joined(output, hidden_states)
        if not return_state or after is None:
            return joined
        return joined, after if forgotten is None else replace(after, forgotten=forgotten)

    def _expanded(
        self, query: Tensor, keys: Keys, is_biased: bool, lifespans: Lifespans, score_mod: ScoreMod | None,
        sequences: Sequences | None,
    ) -> Tensor:  # fmt: skip
        """Attention of query [B, H, N, D] to keys and values of each head, [B, H, N, dv]."""
        heads = self.kv_b_proj(keys.value[:, 0]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        nope, value = heads.split([self.qk_nope_head_dim, self.v_head_dim], -1)
        key = torch.cat([nope, keys.key.to(nope.dtype).expand(-1, self.num_heads, -1, -1)], -1)
        policy = self.policy
        capacity = policy.capacity
        if sequences is not None:
            capacity = capacity_of_sequences(policy, sequences, self.lowering)
        return attend(
            query, key, value, keys.gate if is_biased else None, lifespans, in_order=True, ranked=policy.is_ranked,
            capacity=capacity, scale=self.scale, score_mod=score_mod, lowering=self.lowering, block_size=self.block_size,
            kernel_options=self.kernel_options, sink_logits=None,
        )  # fmt: skip
