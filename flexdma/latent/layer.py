"""DynamicMaskLatentAttention: latents of tokens, a gate of each latent, and attention to the w best-gated ones."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from flexdma import checks
from flexdma.attention_layer import refuse_beside_sequences
from flexdma.latent.attention import LatentAttention, LatentTokens
from flexdma.lifespans import Selection
from flexdma.mixed_precision import autocast
from flexdma.sequences import packed_sequences
from flexdma.signatures import LayerOptions, ScoreMod
from flexdma.state import State, check_state_matches
from flexdma.state.donation import check_donation
from flexdma.varlen import score_mod_in_sequences


class DynamicMaskLatentAttention(LatentAttention):
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
    recency_ranks: as in `DynamicMaskAttention`.
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
        form: str = "identity",
        recency: str | None = None,
        slopes: Sequence[float] | None = None,
        recency_ranks: bool = True,
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
        self._make_gate(1, kv_lora_rank, form, recency, slopes, recency_ranks)
        self._make_output_gate(output_gate, hidden_size, num_heads * v_head_dim, bias)

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

        position_embeddings: cos and sin of the rotary embedding, each [N, dr] or [B, N, dr], the halves repeated (also with
            rope_interleave); None for no rotation.
        Others as in `DynamicMaskAttention.forward`.  The state's key is the rotated key [B, 1, C, dr], its value the latent
        [B, 1, C, r].

        Returns [B, N, hidden_size], or (that, DynamicMaskState or GrowingState) with return_state.
        """
        tokens = LatentTokens(*autocast(*self.project(hidden_states, position_embeddings)))
        check_donation(donate, state, return_state, *tokens)
        checks.scores(None, score_mod)
        sequences = None
        if cu_seqlens is not None:
            refuse_beside_sequences(key_padding_mask=key_padding_mask, document_ids=document_ids, state=state)
            sequences = packed_sequences(cu_seqlens, tokens.key.shape[2], tokens.key)
            document_ids = sequences.number[None]
            score_mod = None if score_mod is None else score_mod_in_sequences(score_mod, sequences)
        if state is not None or return_state:
            self.policy.refuse_without_state()
        if sequences is not None and return_state:
            self.policy.refuse_without_bound("with cu_seqlens and return_state")
        if state is not None:
            check_state_matches(state, tokens.key, tokens.latent, self._gate_dtype, self.policy, self._bias_dtype)
        gates = self._gates(tokens.latent, key_padding_mask, cu_seqlens, state, return_state)
        masks: dict[str, Any] = {"key_padding_mask": key_padding_mask, "document_ids": document_ids}
        checks.selected_keys(self.policy.gates(gates.gate, tokens.key), **masks)
        if self.policy.is_bounded or not (return_state or state is not None):
            output, after = self._attend(tokens, gates, masks, score_mod, sequences, state, return_state, donate)
        else:
            output, after = self._attend_growing(tokens, gates, masks, score_mod, state, donate)
        joined = self._joined(output, hidden_states)
        if not return_state or after is None:
            return joined
        return joined, after if gates.forgotten is None else after._with(forgotten=gates.forgotten)
