"""One layer of a `DynamicMaskCache`: the keys that later queries can see, and the records for an exact rollback."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from flexdma.attention import dynamic_mask_attention
from flexdma.integrations.transformers.recorded_pass import RecordedPass, gated
from flexdma.mixed_precision import autocast
from flexdma.state import DynamicMaskState
from flexdma.state.decoding import decode
from flexdma.state.donation import can_donate

# Keywords of `decode`.
DECODING_OPTIONS = ("scale", "score_mod", "sink_logits", "key_padding_mask", "document_ids")


class DynamicMaskLayer(CacheLayerMixin):
    """The keys of one layer that later queries can see.

    `update` returns the new keys and values unchanged.  `attend`, called once after it with their gates, stores them.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self) -> None:
        # Does not call the base class's, which assigns `keys` and `values`.
        self.is_initialized = False
        self.state: DynamicMaskState | None = None
        self.tokens = 0
        self.record_past = False
        # Number of tokens of the last `update`, until `attend` stores them.
        self._pending: int | None = None
        self._past: list[RecordedPass] = []  # passes since the last `crop`

    @property
    def keys(self) -> Tensor | None:
        """[B, Hkv, C, D], the key of each slot of `state`, 0 where `state.position` is -1; None before the first token."""
        return None if self.state is None else self.state.key

    @property
    def values(self) -> Tensor | None:
        """[B, Hkv, C, Dv], the value of each slot, like `keys`."""
        return None if self.state is None else self.state.value

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Does nothing, because the first `attend` makes the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values, unchanged.

        Raises RuntimeError where no `attend` followed the last `update`, or in a backward; ValueError or TypeError where the
        number of sequences or the dtype is not that of the cache.
        """
        # Activation checkpointing runs the layer again in the backward, and the cache would count its tokens twice.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "cache: expected None under activation checkpointing, got DynamicMaskCache in a recomputation"
            )
        if self._pending is not None:
            raise RuntimeError(
                "cache: expected a model of use_flexdma or convert_to_dma for DynamicMaskCache, and forward passes that end, "
                "got an update after which no attention took the keys; reset() empties the cache"
            )
        if self.state is not None:
            _refuse_other_tokens(self.state, *autocast(key_states, value_states))
        self._pending = key_states.shape[2]
        return key_states, value_states

    def attend(self, query: Tensor, key: Tensor, value: Tensor, gate: Callable[..., Tensor], **options: Any) -> Tensor:
        """Attention [B, Hq, Q, Dv] of the new tokens to the kept keys and their own; stores the new keys.

        Raises RuntimeError unless it follows an `update` of as many keys, because the cache would count keys twice.
        """
        if self._pending is None:
            raise RuntimeError(
                "cache: expected one attention after each update of a layer, got one without an update: the layer calls its "
                "attention twice, or does not update this cache"
            )
        if self._pending != key.shape[2]:
            raise RuntimeError(
                f"cache: expected attention to the {self._pending} keys of the last update, got {key.shape[2]}"
            )
        gates, forgotten = gated(gate, value, self.state, options["key_padding_mask"])
        donate = self._owns_its_state(query, key, value, gates, options.get("sink_logits"))
        if self.state is not None and _is_checked_token(self.state, query, key, value, gates, options):
            new_query, new_key, new_value = autocast(query, key, value)
            output, after = decode(
                new_query, new_key, new_value, gates, self.state, donate=donate,
                **{name: options.get(name) for name in DECODING_OPTIONS},
            )  # fmt: skip
        else:
            output, after = dynamic_mask_attention(
                query, key, value, gates, state=self.state, return_state=True, donate=donate, **options
            )
        if self.record_past:
            self._past.append(RecordedPass(self.state, self.tokens, key, value, gates, gate, after.key.dtype, options))
        self.state = after if forgotten is None else replace(after, forgotten=forgotten)
        self.tokens += key.shape[2]
        self.is_initialized, self._pending = True, None
        return output

    def _owns_its_state(self, *tensors: Tensor | None) -> bool:
        """Whether no one needs the state before a pass of these tensors, so that the pass may overwrite it."""
        return self.state is not None and not self.record_past and can_donate(self.state, *tensors)

    def activate_past_recording(self) -> None:
        """From now on record passes, so that `crop` is exact.  The records grow until `crop`, as in transformers' caches."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens.  Raises ValueError where keys that they evicted are not recorded."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            raise ValueError(
                f"tokens_to_remove: expected a number <= 0, as transformers gives it, got {tokens_to_remove}"
            )
        kept = self.tokens + tokens_to_remove
        recorded = [step for step in self._past if step.length <= kept]
        self._past = []
        if tokens_to_remove == 0 or self.state is None:
            return
        if recorded:
            self.state = recorded[-1].state_after(kept - recorded[-1].length)
        else:
            self.state = self.state.crop(-tokens_to_remove)
        self.tokens = kept

    def get_seq_length(self) -> int:
        """Number of tokens so far, padding included."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(length, offset) of the keys that a mask covers: the new ones."""
        return query_length, self.tokens

    def get_max_length(self) -> int:
        """-1 = no limit."""
        return -1

    def reset(self) -> None:
        """Remove all tokens."""
        self.state, self.tokens, self._past, self._pending, self.is_initialized = None, 0, [], None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these batch rows; repeats are allowed."""
        if self.state is not None:
            rows = beam_idx.to(self.state.length.device, torch.int64)  # beam search passes int32
            self.state, self._past = self.state.reorder(rows), []

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these batch rows, given by number or as a bool mask."""
        self.reorder_cache(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row `repeats` times."""
        if self.state is not None:
            device = self.state.length.device
            self.reorder_cache(torch.arange(len(self.state.length), device=device).repeat_interleave(repeats))

    def offload(self) -> None:
        """Raises NotImplementedError: the cache is small, so there is little to offload."""
        raise NotImplementedError("offload: expected a growing cache, got DynamicMaskCache, whose size is fixed")


def _is_checked_token(
    state: DynamicMaskState, query: Tensor, key: Tensor, value: Tensor, gates: Tensor, options: dict[str, Any]
) -> bool:
    """Whether this is one token with the sizes and options of the state, which the first pass of the layer checked.

    The checks of `dynamic_mask_attention` take as long as decoding itself.
    """
    batch, heads, count, size = key.shape
    slots, value_slots = state.key.shape, state.value.shape
    return (
        count == 1
        and options.get("lowering") is None
        and slots[:2] == (batch, heads)
        and (slots[3], value_slots[3]) == (size, value.shape[3])
        and (gates.shape, gates.dtype) == (key.shape[:3], state.gate.dtype)
        and query.shape[0] == batch
        and query.shape[3] == size
        and query.shape[1] % heads == 0
        and all(getattr(state, name) == options.get(name, 0) for name in ("window_size", "sinks", "recent"))
        and state.selection == "causal"
    )


def _refuse_other_tokens(state: DynamicMaskState, key: Tensor, value: Tensor) -> None:
    """Raise unless these keys and values have the batch size and dtype of the state's."""
    if len(state.length) != len(key):
        raise ValueError(
            f"cache: expected one of batch size {len(key)}, as the tokens have, got one of batch size {len(state.length)}"
        )
    for name, new, kept in (("keys", key, state.key), ("values", value, state.value)):
        if new.dtype != kept.dtype:
            raise TypeError(
                f"cache: expected {name} of {new.dtype}, as the layer has, got {kept.dtype}; use one cache either under "
                "torch.autocast or outside of it, not both"
            )
