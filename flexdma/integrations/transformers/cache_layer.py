"""One layer of a `DynamicMaskCache`: the keys that later queries can see, and the records for an exact rollback."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from flexdma.attention import dynamic_mask_attention
from flexdma.integrations.transformers.recorded_pass import Gated, RecordedPass, gated
from flexdma.mixed_precision import autocast, is_autocast
from flexdma.state import DynamicMaskState, GrowingState, State
from flexdma.state.donation import can_donate
from flexdma.state.token_run import TokenRun, has_sizes_of, run_of
from flexdma.transforms import is_plain_on_cpu, needs_gradient

# A token with one of these options is not computed by a run.
ENDS_RUN = ("score_mod", "sink_logits", "key_padding_mask", "document_ids", "lowering")


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
        self._state: State | None = None
        # Of the last token, if decoding on a CPU computed it; then `_state` is an earlier one.
        self._run: TokenRun | None = None
        self._run_options: dict[str, Any] = {}  # of `attend`
        self.tokens = 0
        self._peak_nbytes = 0
        self.record_past = False
        # Number of tokens of the last `update`, until `attend` stores them.
        self._pending: int | None = None
        self._past: list[RecordedPass] = []  # passes since the last `crop`

    @property
    def state(self) -> State | None:
        """The keys that later queries can see; None before the first token.  A later token overwrites its slots."""
        if self._run is not None:
            self._state = self._run.state()
            if not self._run.is_valid():  # a caller could write to it unnoticed
                self._run = None
        return self._state

    @state.setter
    def state(self, state: State | None) -> None:
        self._state, self._run = state, None

    def __getstate__(self) -> dict[str, Any]:
        self.state = self.state  # a copy does not share a run
        return self.__dict__

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
        # A recomputation enables gradients.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "cache: expected None under activation checkpointing, got DynamicMaskCache in a recomputation"
            )
        if self._pending is not None:
            raise RuntimeError(
                "cache: expected a model of use_flexdma or convert_to_dma for DynamicMaskCache, and forward passes that end, "
                "got an update after which no attention took the keys; reset() empties the cache"
            )
        state = self._state
        if state is not None and not (
            key_states.dtype == value_states.dtype == state.key.dtype == state.value.dtype
            and key_states.shape[0] == state.key.shape[0]
            and not is_autocast(key_states.device.type)
        ):
            _refuse_other_tokens(state, *autocast(key_states, value_states))
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
        run = self._run
        same = run is not None and options == self._run_options and run.is_writable() and not run.is_overwritten()
        if not same or not is_plain_on_cpu(query, key, value):
            run = self._begun(query, key, value, options)
        gates, bias, forgotten = found = gated(gate, value, run or self.state, options["key_padding_mask"])
        output = None
        if (
            run is not None
            and has_sizes_of(run.before, query, key, value, gates, bias)
            and not needs_gradient(gates, bias)
        ):
            if torch.is_autocast_enabled("cpu"):
                query, key, value = autocast(query, key, value)
            if query.dtype == key.dtype and run.insert(key, value, gates, bias):
                scale = options.get("scale")
                output = run.attention(query, query.shape[3] ** -0.5 if scale is None else scale)
        if output is None:
            output = self._attend(query, key, value, gate, found, options)
        elif run is not None and forgotten is not None:
            run.forgotten = forgotten
        self.tokens += key.shape[2]
        self.is_initialized, self._pending = True, None
        return output

    def _begun(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> TokenRun | None:
        """A run that begins with this token; None where these arguments, but for gates, are not those of one.

        The checks of `dynamic_mask_attention`, and a state after each token, take longer than decoding itself.
        """
        state = self.state
        self._run = None
        if (
            not isinstance(state, DynamicMaskState)
            or key.shape[2] != 1
            or self.record_past
            or any(options.get(name) is not None for name in ENDS_RUN)
            or state.selection != "causal"
            or any(getattr(state, name) != options.get(name, 0) for name in ("window_size", "sinks", "recent"))
            or not is_plain_on_cpu(query, key, value, *state.tensors().values())
            or not can_donate(state)
        ):
            return None
        self._run, self._run_options = run_of(state), options
        return self._run

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, gate: Callable[..., Tensor], found: Gated,
        options: dict[str, Any],
    ) -> Tensor:  # fmt: skip
        """`attend` of any tokens, by the operator."""
        state, (gates, bias, forgotten) = self.state, found
        self._run = None
        others = (query, key, value, gates, bias, options.get("sink_logits"))
        donate = state is not None and not self.record_past and can_donate(state, *others)
        output, after = dynamic_mask_attention(
            query, key, value, gates, bias=bias, state=state, return_state=True, donate=donate, **options
        )
        if self.record_past:
            self._past.append(RecordedPass(state, self.tokens, key, value, gates, bias, gate, after.key.dtype, options))
        self._state = after if forgotten is None else after._with(forgotten=forgotten)
        if not torch.compiler.is_compiling():  # a number that changes would be guarded; slots are constant there
            self._peak_nbytes = max(self._peak_nbytes, after.nbytes)
        return output

    def activate_past_recording(self) -> None:
        """From now on record passes, so that `crop` is exact.  The records grow until `crop`, as in transformers' caches."""
        self.state = self.state  # ends a run
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

    @property
    def peak(self) -> int:
        """The largest number of keys that one query has seen; 0 for a DynamicMaskState, which its slots bound."""
        state = self.state
        return int(state.peak.max()) if isinstance(state, GrowingState) and state.peak.numel() else 0

    @property
    def peak_nbytes(self) -> int:
        """The most bytes that `state` has had after a forward pass."""
        return max(self._peak_nbytes, 0 if self._state is None else self._state.nbytes)

    def reserve(self, tokens: int) -> None:
        """As `GrowingState.reserve`; does nothing for a DynamicMaskState, and before the first token."""
        state = self.state
        if isinstance(state, GrowingState):
            self._peak_nbytes = self.peak_nbytes
            self.state = state.reserve(tokens)

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
        self._peak_nbytes = 0

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


def _refuse_other_tokens(state: State, key: Tensor, value: Tensor) -> None:
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
