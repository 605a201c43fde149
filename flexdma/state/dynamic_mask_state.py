"""DynamicMaskState: the keys that later queries can still see.

After any prefix of a causal running top-w ("Trainable Dynamic Mask Sparse Attention", arXiv 2508.02124) later queries can
see only the w keys that are visible now; with sinks and recent tokens, only w + sinks + recent keys.  So

    (state, new tokens) -> (output, new state)

is decoding with one new token and chunked prefill with many.  Both equal one pass over all tokens; the tests check this with
ties, sinks, recent keys, padding and documents.  SparseK (arXiv 2406.16747) and later trained evictions bound a cache in the
same way.

A state is a value: nothing changes it in place unless it is donated, so callers can keep it, branch from it and differentiate
through it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from flexdma import checks
from flexdma.lifespans import STATEFUL_SELECTIONS, Selection
from flexdma.state.layout import EMPTY, StateLayout, refuse_difference, state_layout
from flexdma.state.rollback import cropped

if TYPE_CHECKING:
    from flexdma.state.token_run import TokenRun


@dataclass(frozen=True, eq=False)
class DynamicMaskState:
    """The state that `dynamic_mask_attention(..., state=..., return_state=True)` takes and returns; `empty` makes the first.

    C = w + sinks + recent slots per KV head, w the widest window.  Slots 0 .. w - 1 hold the top-w in any order, the others
    hold the sinks and recent keys outside the top-w.  An empty slot has position -1, gate -inf, key and value 0.

    key [B, Hkv, C, D], value [B, Hkv, C, Dv], gate [B, Hkv, C] float32 or float64, position [B, Hkv, C] int64.
    length: [B] int64, number of tokens so far, padding included; also the position of the next token.
    real_length: [B] int64, number of tokens so far without padding; `ValueGate` takes it as `first_position`.
    last_padding: [B] int64, position of the latest padded token; -1 for none.  `crop` reads it.
    document: [B] int64, the id of the last token's document; 0 where no ids were given.
    last_sink: [B, Hkv] int64, position of the latest sink of that document; -1 for none.
    last_loss: [B, Hkv] int64, the latest position whose arrival evicted a visible key; -1 for none.  `crop` reads it.
    forgotten: [B, Hkv] float64, the sum of -logsigmoid so far for `ValueGate(recency="forget")`; the operator only copies it.
    window_size, sinks, recent, selection: of the operator.
    """

    key: Tensor
    value: Tensor
    gate: Tensor
    position: Tensor
    length: Tensor
    real_length: Tensor
    last_padding: Tensor
    document: Tensor
    last_sink: Tensor
    last_loss: Tensor
    forgotten: Tensor
    window_size: int | tuple[int, ...]
    sinks: int = 0
    recent: int = 0
    selection: str = "causal"
    # Not a field: the run that made this state, if decoding on a CPU did.
    _run: ClassVar["TokenRun | None"] = None

    @classmethod
    def empty(
        cls,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        window_size: int | Sequence[int],
        *,
        value_dim: int | None = None,
        sinks: int = 0,
        recent: int = 0,
        selection: str = "causal",
        dtype: torch.dtype = torch.float32,
        gate_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> "DynamicMaskState":
        """The state before the first token.

        batch_size, num_kv_heads, head_dim, value_dim: B, Hkv, D and Dv (default D).
        window_size, sinks, recent, selection: as in `dynamic_mask_attention`; selection is "causal" or "threshold".
        dtype: of keys and values.  gate_dtype: float64 for float64 gates (those with a recency), float32 for all others.
        Raises ValueError or TypeError naming the argument.
        """
        value_dim = head_dim if value_dim is None else value_dim
        checks.positive_int("batch_size", batch_size, 0)
        for name, size in (("num_kv_heads", num_kv_heads), ("head_dim", head_dim), ("value_dim", value_dim)):
            checks.positive_int(name, size)
        if gate_dtype not in (torch.float32, torch.float64):
            raise TypeError(f"gate_dtype: expected torch.float32 or torch.float64, got {gate_dtype}")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype: expected a floating point torch.dtype, got {dtype!r}")
        policy = Selection.of(selection, window_size, sinks, recent, heads=num_kv_heads, kinds=STATEFUL_SELECTIONS)
        policy.refuse_without_state()
        slots = (batch_size, num_kv_heads, cast(int, policy.capacity))
        layout = state_layout(slots, head_dim, value_dim, dtype, gate_dtype)
        tensors: dict[str, Any] = {
            name: torch.full(shape, EMPTY.get(name, 0), dtype=of, device=device) for name, (shape, of) in layout.items()
        }
        return cls(**tensors, **state_options(policy))

    @property
    def policy(self) -> Selection:
        """The options as one value."""
        return Selection(self.selection, self.window_size, self.sinks, self.recent)

    @property
    def widest(self) -> int:
        """w, the largest window: the number of slots for the top-w."""
        return self.position.shape[-1] - self.sinks - self.recent

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors.  They do not grow with the context."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: getattr(self, name) for name in TENSORS}

    def options(self) -> dict[str, Any]:
        """The fields that are not tensors, by name."""
        return {name: getattr(self, name) for name in OPTIONS}

    def _with(self, **changes: Any) -> "DynamicMaskState":
        """As dataclasses.replace, in less time, and keeps `_run`."""
        if torch.compiler.is_compiling():
            return replace(self, **changes)
        changed = object.__new__(DynamicMaskState)
        changed.__dict__.update(self.__dict__, **changes)
        return changed

    def __getstate__(self) -> dict[str, Any]:
        """The fields, for copies and files."""
        return {**self.tensors(), **self.options()}

    def _layout(self) -> StateLayout:
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors().items()}

    def _refuse_other(self, name: str, other: object, *, batch: bool = True) -> None:
        if not isinstance(other, DynamicMaskState):
            raise TypeError(f"{name}: expected a DynamicMaskState, got {type(other).__name__}")
        refuse_difference(name, other, self._layout(), self.options(), self.length.device, batch=batch)

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> "DynamicMaskState":
        return replace(self, **{name: function(name, tensor) for name, tensor in self.tensors().items()})  # type: ignore[arg-type]

    def to(self, device: torch.device | str | None, *, non_blocking: bool = False) -> "DynamicMaskState":
        """The same state on another device, None = its own.  Dtypes stay.  accelerate moves arguments by this method."""
        if not isinstance(device, str | torch.device | None):
            raise TypeError(f"device: expected a device, got {device!r}")
        return self._map(lambda _, tensor: tensor.to(device=device, non_blocking=non_blocking))

    def detach(self) -> "DynamicMaskState":
        """The state without its autograd graph, for truncated back-propagation through chunks."""
        return self._map(lambda _, tensor: tensor.detach())

    def checkpoint(self) -> "DynamicMaskState":
        """A copy to `restore` later.  It stays valid where CUDA graphs reuse the memory of this state."""
        return self._map(lambda _, tensor: tensor.clone())

    def restore(self, saved: "DynamicMaskState") -> "DynamicMaskState":
        """A copy of `saved`.  Raises ValueError or TypeError unless `saved` has this state's shapes, dtypes and options."""
        self._refuse_other("saved", saved)
        return saved.checkpoint()

    def reorder(self, rows: Tensor) -> "DynamicMaskState":
        """The state of these batch rows, [any] int64, repeats allowed: for beam search, and sequences that end or branch."""
        _check_rows(rows, "rows", self.length)
        return self._map(lambda _, tensor: tensor.index_select(0, rows))

    def put(self, rows: Tensor, other: "DynamicMaskState") -> "DynamicMaskState":
        """The state with these batch rows, [n] int64 and distinct, replaced by the n rows of `other`."""
        self._refuse_other("other", other, batch=False)
        _check_rows(rows, other.length.shape[0], self.length)
        theirs = other.tensors()
        return self._map(lambda name, tensor: tensor.index_copy(0, rows, theirs[name]))

    def crop(self, tokens: int | Tensor) -> "DynamicMaskState":
        """The state before the last `tokens` tokens, one int or one per sequence [B] int64.

        Raises ValueError where a visible key has been evicted since, where one of these tokens is padded, and with forget
        gates; take a `checkpoint()` first in these cases.  Nothing is evicted while recent=0 and there is one document with
        fewer tokens than the narrowest window.  Synchronises with the device.
        """
        return cropped(self, tokens)


TENSORS = tuple(field.name for field in fields(DynamicMaskState) if field.type is Tensor)
OPTIONS = tuple(field.name for field in fields(DynamicMaskState) if field.type is not Tensor)

# torch.load(weights_only=True), the default, loads no other classes.
torch.serialization.add_safe_globals([DynamicMaskState])

pytree.register_pytree_node(
    DynamicMaskState,
    lambda state: (list(state.tensors().values()), tuple(state.options().values())),
    lambda tensors, options: DynamicMaskState(*tensors, *options),
    serialized_type_name="flexdma.DynamicMaskState",
    # JSON has no tuples.
    to_dumpable_context=list,
    from_dumpable_context=lambda options: tuple(tuple(o) if isinstance(o, list) else o for o in options),
    flatten_with_keys_fn=lambda state: (
        [(pytree.GetAttrKey(name), tensor) for name, tensor in state.tensors().items()],
        tuple(state.options().values()),
    ),
)


def check_state_matches(state: object, key: Tensor, value: Tensor, gate_dtype: torch.dtype, policy: Selection) -> None:
    """Raise unless `state` fits keys [B, Hkv, n, D], values [B, Hkv, n, Dv], gates of this dtype and this selection."""
    if not isinstance(state, DynamicMaskState):
        raise TypeError(f"state: expected a DynamicMaskState, got {type(state).__name__}")
    batch, heads, _keys, size = key.shape
    slots = (batch, heads, cast(int, policy.capacity))
    layout = state_layout(slots, size, value.shape[3], key.dtype, gate_dtype)
    refuse_difference("state", state, layout, state_options(policy), key.device)


def state_options(policy: Selection) -> dict[str, Any]:
    """The options of a state with this selection, by name."""
    return {
        "window_size": policy.window_size, "sinks": policy.sinks, "recent": policy.recent, "selection": policy.kind
    }  # fmt: skip


def _check_rows(rows: Tensor, count: object, like: Tensor) -> None:
    checks.tensor("rows", rows, (count,), like)
    if rows.dtype != torch.int64:
        raise TypeError(f"rows: expected torch.int64, got {rows.dtype}")
