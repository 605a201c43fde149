"""The projections of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), named as in DeepSeek-V3's checkpoints."""

import torch
from torch import Tensor, nn

from flexdma import checks
from flexdma.attention_layer import AttentionLayer
from flexdma.latent.absorbed import up_projections
from flexdma.rotary import halves_of_pairs, rotary_tables, rotate
from flexdma.state import State
from flexdma.transforms import needs_gradient


class LatentProjections(AttentionLayer):
    """The base of `DynamicMaskLatentAttention`, whose arguments its attributes are."""

    hidden_size: int
    num_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool
    scale: float
    _up: Tensor  # None where nothing is kept

    def _make_projections(self, q_lora_rank: int | None, bias: bool, norm_eps: float) -> None:
        size = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.has_query_latent = q_lora_rank is not None
        if q_lora_rank is None:
            self.q_proj = nn.Linear(self.hidden_size, self.num_heads * size, bias=False)
        else:
            self.q_a_proj = nn.Linear(self.hidden_size, q_lora_rank, bias=bias)
            self.q_a_layernorm = nn.RMSNorm(q_lora_rank, eps=norm_eps)
            self.q_b_proj = nn.Linear(q_lora_rank, self.num_heads * size, bias=False)
        rank, heads = self.kv_lora_rank, self.num_heads
        self.kv_a_proj_with_mqa = nn.Linear(self.hidden_size, rank + self.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(rank, eps=norm_eps)
        self.kv_b_proj = nn.Linear(rank, heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * self.v_head_dim, self.hidden_size, bias=bias)
        self.register_buffer("_up", None, persistent=False)
        self._up_from: list[tuple[nn.Parameter, int, int]] = []

    def project(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query [B, H, N, dn] and its rotated part [B, H, N, dr], the rotated key [B, 1, N, dr], the latent [B, 1, N, r]."""
        checks.tensor("hidden_states", hidden_states, ("B", "N", self.hidden_size))
        if self.has_query_latent:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        else:
            query = self.q_proj(hidden_states)
        rotated = self.qk_rope_head_dim
        query, query_rope = query.unflatten(-1, (self.num_heads, -1)).split([self.qk_nope_head_dim, rotated], -1)
        latent, key = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(2).split([self.kv_lora_rank, rotated], -1)
        latent = self.kv_a_layernorm(latent)
        if position_embeddings is not None:
            cos, sin = rotary_tables(position_embeddings, hidden_states, rotated, "qk_rope_head_dim", key.dtype)
            if self.rope_interleave:
                query_rope, key = halves_of_pairs(query_rope), halves_of_pairs(key)
            query_rope, key = rotate(query_rope, cos, sin), rotate(key, cos, sin)
        query, query_rope, key, latent = (tensor.transpose(1, 2) for tensor in (query, query_rope, key, latent))
        return query, query_rope, key, latent

    def empty_state(
        self, batch_size: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> State:
        """The state of this layer before the first token: (r + dr) numbers for each of w + sinks + recent tokens.

        dtype, device: as in `DynamicMaskAttention.empty_state`, with kv_a_proj_with_mqa for v_proj.
        """
        sizes = (self.qk_rope_head_dim, self.kv_lora_rank)
        return self._empty_state(batch_size, 1, *sizes, self.kv_a_proj_with_mqa, dtype, device)

    @torch.no_grad()
    def absorb(self) -> None:
        """Keep the up-projections of keys and values that decoding multiplies with, [H, dn + dv, r].

        Without it each decoded token calls kv_b_proj on the r unit vectors, which is right whatever its weights are, and as
        much work as the keys and values of r tokens.  The kept tensor is not used where a gradient of kv_b_proj is needed,
        and is dropped where a parameter of kv_b_proj is another one or was changed in place.

        Call it again after what torch does not count: writes through `.data`, as when an adapter is merged or averaged
        weights are swapped in, writes to parameters made in inference mode, and an adapter that is switched off.  Compiled
        calls see no change at all.
        """
        empty = self.empty_state(0)
        self._up = up_projections(self.kv_b_proj, empty.value, self.num_heads).contiguous()
        self._up_from = [(p, p.data_ptr(), _version(p)) for p in self.kv_b_proj.parameters()]

    def _up_projections(self, latent: Tensor) -> Tensor:
        if self._up is not None and not needs_gradient(*self.kv_b_proj.parameters()):
            if torch.compiler.is_compiling() or self._has_same_weights():
                return self._up
            self._up, self._up_from = None, []  # type: ignore[assignment]
        return up_projections(self.kv_b_proj, latent, self.num_heads)

    def _has_same_weights(self) -> bool:
        """Whether kv_b_proj has the parameters that it had in `absorb`, as far as torch counts changes."""
        weights = list(self.kv_b_proj.parameters())
        return len(weights) == len(self._up_from) and all(
            weight is before and weight.data_ptr() == address and _version(weight) == version
            for weight, (before, address, version) in zip(weights, self._up_from, strict=True)
        )


def _version(weight: Tensor) -> int:
    """How often torch counted a write to it; 0 for tensors made in inference mode, which have no count."""
    return 0 if weight.is_inference() else weight._version
