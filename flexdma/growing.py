"""Attention with a state that grows, for any policy in which the death of a key does not depend on other keys."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flexdma import checks
from flexdma.mixed_precision import autocast
from flexdma.opaque import apart
from flexdma.signatures import ScoreMod
from flexdma.state import GrowingState
from flexdma.state.carry import of_heads
from flexdma.state.donation import check_donation
from flexdma.state.growing_call import attend_growing
from flexdma.state.growing_chunk import NewKeys
from flexdma.transforms import can_read, refuse_jit_trace


def growing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    state: GrowingState | None = None,
    lifetime: Tensor | None = None,
    expiry: Tensor | None = None,
    clock: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
    donate: bool = False,
    lowering: str | None = None,
    block_size: int | tuple[int, int] | None = None,
    kernel_options: Mapping[str, object] | None = None,
) -> tuple[Tensor, GrowingState]:
    """Attention of n new tokens to the living keys of a state and their own, and the state after them.

    query: [B, Hq, Q, D]; the queries are the last Q of the n new positions.
    key: [B, Hkv, n, D], value: [B, Hkv, n, Dv], of query's dtype; Hkv divides Hq (query head h reads head h // G).
    state: of the earlier tokens; None before the first.  The result equals that of one call over all tokens.
    lifetime: [B, Hkv, n] or [B, 1, n], integers or floats: for how many positions, its own included, each key is visible;
        below 1 = never; inf, NaN or None = to the end of its document.
    expiry, clock: instead of lifetime, for deaths that later tokens decide; [B, Hkv, n] or [B, 1, n], in float64.
        A key is visible from its own position to the last one before the first clock_i > expiry_j.  The clock must not fall,
        over all calls; on a CPU outside of torch.compile a fall in one call raises.  No key dies at a NaN.
    bias: [B, Hkv, n] or [B, 1, n], added to the logits of a key; float64 keeps numbers that grow with position exact.  -inf =
        never visible.  None = no bias.
    key_padding_mask, document_ids: [B, n], of the new tokens, as in `dynamic_mask_attention`.
    scale, score_mod, donate, lowering, block_size, kernel_options: as in `dynamic_mask_attention`.

        DMS: lifetime = where(alpha > 0, window, inf)           KVzap: lifetime = where(score < threshold, window, inf)
        FoX, pruned: F = earlier sum + log_forget.cumsum(-1), in float64; bias = -F, clock = -F, expiry = -(F + delta)

    Returns ([B, Hq, Q, Dv] in query's dtype, GrowingState).  A query that sees no key gives 0, and gradient 0.
    Differentiable in query, key, value, bias, and tensors that score_mod captures, also through a state.
    Raises ValueError or TypeError naming the argument, and inside `torch.func` and torch.export.  In a compiled function the
    number of slots does not change; see `GrowingState.reserve`.
    O((n + C) log (n + C) + n C) time; one token O(C), where C is at most four times the number of living keys.
    DMS: arXiv 2506.05345.  KVzap: arXiv 2601.07891.  FoX with pruning: arXiv 2504.06949.
    """
    refuse_jit_trace()
    query, key, value = autocast(query, key, value)
    checks.attention_arguments(query, key, value)
    checks.scores(scale, score_mod)
    if bias is None:
        bias = torch.zeros(key.shape[:3], dtype=torch.float32, device=key.device)
    bias = apart(bias)
    checks.bias("bias", bias, key)
    bias = of_heads(bias, key)
    masks: dict[str, Any] = {"key_padding_mask": key_padding_mask, "document_ids": document_ids}
    checks.selected_keys(bias, **masks)
    check_donation(donate, state, True, query, key, value, bias)
    if (clock is None) != (expiry is None):
        missing = "clock" if clock is None else "expiry"
        raise ValueError(f"{missing}: expected a tensor, as clock and expiry belong together, got None")
    if clock is None or expiry is None:
        ages = _lifetimes(lifetime, key)
        new = NewKeys(key, value, bias, lambda is_sink: ages, None, None, **masks)
    else:
        if lifetime is not None:
            raise ValueError("lifetime: expected None with a clock, got a tensor")
        new = NewKeys(key, value, bias, None, _floats("expiry", expiry, key), _clock(clock, key), **masks)
    options = {"sinks": 0, "recent": 0, "selection": "lifetime" if clock is None else "clock"}
    return attend_growing(
        query, new, state, options, scale=scale, score_mod=score_mod, sink_logits=None, ranked=False, best_stays=False,
        donate=donate, lowering=lowering, block_size=block_size, kernel_options=kernel_options,
    )  # fmt: skip


def _lifetimes(lifetime: Tensor | None, key: Tensor) -> Tensor:
    """[B, Hkv, n] float64."""
    if lifetime is None:
        return torch.full(key.shape[:3], float("inf"), dtype=torch.float64, device=key.device)
    checks.per_key("lifetime", lifetime, key)
    if lifetime.is_complex() or lifetime.dtype == torch.bool:
        raise TypeError(f"lifetime: expected integers or floats, got {lifetime.dtype}")
    return lifetime.detach().double().expand(key.shape[:3])


def _floats(name: str, numbers: Tensor, key: Tensor) -> Tensor:
    """[B, Hkv, n] float64."""
    checks.bias(name, numbers, key)
    return numbers.detach().double().expand(key.shape[:3])


def _clock(clock: Tensor, key: Tensor) -> Tensor:
    clock = _floats("clock", clock, key)
    if clock.is_cpu and can_read(clock) and bool((clock[..., 1:] < clock[..., :-1]).any()):
        raise ValueError("clock: expected numbers that do not fall from one position to the next, got some that do")
    return clock
