"""Attention over latents: expanded to keys and values of each head for several tokens, absorbed for one."""

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from flexdma.attention_layer import KeyGates
from flexdma.latent.absorbed import absorbed_attention
from flexdma.latent.projections import LatentProjections
from flexdma.lifespans import Lifespans
from flexdma.lowerings.attend import attend
from flexdma.sequences import Sequences
from flexdma.signatures import ScoreMod
from flexdma.state import DynamicMaskState, State
from flexdma.state.carry import Keys, first_keys, score_mod_at_positions, state_after, with_state_keys
from flexdma.state.decoding import state_after_token
from flexdma.state.growing import GrowingState, growing_options
from flexdma.state.growing_call import attend_by, seen_at_most
from flexdma.state.growing_chunk import NewKeys, Placed
from flexdma.state.growing_token import without_dead_values
from flexdma.state.packed import states_after
from flexdma.varlen import capacity_of_sequences


class LatentTokens(NamedTuple):
    """What the projections give, in autocast's dtype.

    query_nope [B, H, N, dn], query_rope [B, H, N, dr]: of each head.
    key [B, 1, N, dr]: the rotated key.  latent [B, 1, N, r].
    """

    query_nope: Tensor
    query_rope: Tensor
    key: Tensor
    latent: Tensor


class LatentAttention(LatentProjections):
    """The base of `DynamicMaskLatentAttention` between its projections."""

    def _attend(
        self, tokens: LatentTokens, gates: KeyGates, masks: dict[str, Tensor | None], score_mod: ScoreMod | None,
        sequences: Sequences | None, state: State | None, return_state: bool, donate: bool,
    ) -> tuple[Tensor, State | None]:  # fmt: skip
        """Attention [B, H, N, dv], and with return_state the DynamicMaskState after the tokens."""
        _query_nope, _query_rope, key, latent = tokens
        if not key.shape[2]:
            raise ValueError("hidden_states: expected at least 1 position, got 0")
        gate, bias, policy = self.policy.gates(gates.gate, key), gates.bias, self.policy
        has_gate = gates.gate is not None
        before = cast("DynamicMaskState | None", state)
        if before is not None and self._takes_token(latent):
            after = state_after_token(key, latent, gate, before, **masks, bias=bias, donate=donate)
            return self._absorbed(tokens, after, before.length, score_mod), after
        if before is None:
            keys = first_keys(key, latent, gate, bias=bias, **masks)
        else:
            keys = with_state_keys(before, key, latent, gate, bias=bias, **masks)
            if score_mod is not None:
                score_mod = score_mod_at_positions(score_mod, keys, before.length, self.num_heads)
        lifespans = policy.lifespans(keys.gate, key_padding_mask=keys.key_padding_mask, document_ids=keys.document_ids)
        capacity = policy.capacity
        if sequences is not None:
            capacity = capacity_of_sequences(policy, sequences, self.lowering)
        output = self._expanded(tokens, keys, has_gate, lifespans, capacity, score_mod)
        if not return_state:
            return output, None
        if sequences is not None:
            return output, states_after(key, latent, gate, lifespans, sequences, policy, bias)
        if before is None:
            before = cast(DynamicMaskState, self.empty_state(latent.shape[0], latent.dtype, latent.device))
        return output, state_after(before, keys, lifespans)

    def _attend_growing(
        self, tokens: LatentTokens, gates: KeyGates, masks: dict[str, Any], score_mod: ScoreMod | None,
        state: State | None, donate: bool,
    ) -> tuple[Tensor, State]:  # fmt: skip
        """Attention [B, H, N, dv], and the GrowingState after the tokens."""
        gate, has_gate = self.policy.gates(gates.gate, tokens.key), gates.gate is not None

        def of_chunk(put: Placed, before: GrowingState) -> Tensor:
            at_positions = None
            if score_mod is not None:
                at_positions = score_mod_at_positions(score_mod, put.keys, before.length, self.num_heads)
            return self._expanded(tokens, put.keys, has_gate, put.lifespans, seen_at_most(put), at_positions)

        def of_token(after: GrowingState, now: Tensor, reads: bool) -> Tensor:
            return self._absorbed(tokens, without_dead_values(after), now, score_mod)

        new = NewKeys(
            tokens.key, tokens.latent, gate, partial(self.policy.lifetimes, gate), None, None, bias=gates.bias, **masks
        )
        by_token = of_token if self._takes_token(tokens.latent) else None
        return attend_by(of_chunk, by_token, new, state, growing_options(self.policy), tokens, donate)

    def _takes_token(self, latent: Tensor) -> bool:
        """Whether these are one token, computed in the absorbed form."""
        return latent.shape[2] == 1 and self.lowering is self.block_size is self.kernel_options is None

    def _absorbed(self, tokens: LatentTokens, after: State, now: Tensor, score_mod: ScoreMod | None) -> Tensor:
        """Attention [B, H, 1, dv] of one token at positions now [B] to the latents of the state after it."""
        up = self._up_projections(tokens.latent)
        return absorbed_attention(tokens.query_nope, tokens.query_rope, now, after, up, self.scale, score_mod)

    def _expanded(
        self, tokens: LatentTokens, keys: Keys, has_gate: bool, lifespans: Lifespans, capacity: int | None,
        score_mod: ScoreMod | None,
    ) -> Tensor:  # fmt: skip
        """Attention [B, H, N, dv] to keys and values of each head."""
        query = torch.cat([tokens.query_nope, tokens.query_rope], -1)
        heads = self.kv_b_proj(keys.value[:, 0]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        nope, value = heads.split([self.qk_nope_head_dim, self.v_head_dim], -1)
        key = torch.cat([nope, keys.key.to(nope.dtype).expand(-1, self.num_heads, -1, -1)], -1)
        return attend(
            query, key, value, keys.gate if has_gate else None, lifespans, bias=keys.bias, in_order=True,
            ranked=self.policy.is_ranked, best_stays=self.policy.best_stays, capacity=capacity, scale=self.scale,
            score_mod=score_mod, lowering=self.lowering, block_size=self.block_size, kernel_options=self.kernel_options,
            sink_logits=None, one_document=keys.document_ids is None,
        )  # fmt: skip
