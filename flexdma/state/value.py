"""What all states are: tensors and options that no call changes unless the state is donated."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from typing_extensions import Self

from flexdma import checks
from flexdma.state.layout import StateLayout, refuse_difference

Class = TypeVar("Class", bound="type[State]")


@dataclass(frozen=True, eq=False)
class State:
    """`DynamicMaskState` or `GrowingState`: the keys that later queries can see, in C slots per KV head.

    An empty slot has position -1 and gate -inf.  A subclass is a frozen dataclass, registered by `register`.

    key [B, Hkv, C, D], value [B, Hkv, C, Dv], gate [B, Hkv, C] float32 or float64, position [B, Hkv, C] int64.
    length: [B] int64, number of tokens so far, padding included; also the position of the next token.
    real_length: [B] int64, number of tokens so far without padding; `ValueGate` takes it as `first_position`.
    last_padding: [B] int64, position of the latest padded token; -1 for none.  `crop` reads it.
    document: [B] int64, the id of the last token's document; 0 where no ids were given.
    last_sink: [B, Hkv] int64, position of the latest sink of that document; -1 for none.
    last_loss: [B, Hkv] int64, the latest position whose token no longer saw a visible key; -1 for none.  `crop` reads it.
    forgotten: [B, Hkv] float64, the sum of -logsigmoid so far for `ValueGate(recency="forget")`; the operator only copies it.
    bias: [B, Hkv, C] float32 or float64, what a key adds to its logits beside its gate, 0 in an empty slot; None = nothing.
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
    bias: Tensor | None = field(default=None, kw_only=True)
    # Names of the fields, set by `register`.
    TENSORS: ClassVar[tuple[str, ...]]
    OPTIONS: ClassVar[tuple[str, ...]]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name; no `bias` where it is None."""
        return {name: tensor for name in self.TENSORS if (tensor := getattr(self, name)) is not None}

    def options(self) -> dict[str, Any]:
        """The fields that are not tensors, by name."""
        return {name: getattr(self, name) for name in self.OPTIONS}

    def _with(self, **changes: Any) -> Self:
        """As dataclasses.replace, in less time, and keeps what is not a field."""
        if torch.compiler.is_compiling():
            return replace(self, **changes)
        changed = object.__new__(type(self))
        changed.__dict__.update(self.__dict__, **changes)
        return changed

    def __getstate__(self) -> dict[str, Any]:
        """The fields, for copies and files."""
        return {**self.tensors(), **self.options()}

    def _layout(self) -> StateLayout:
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors().items()}

    def _refuse_other(self, name: str, other: object, *, batch: bool = True) -> None:
        if not isinstance(other, type(self)):
            raise TypeError(f"{name}: expected a {type(self).__name__}, got {type(other).__name__}")
        refuse_difference(name, other, self._layout(), self.options(), self.length.device, batch=batch)

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> Self:
        changed = {name: function(name, tensor) for name, tensor in self.tensors().items()}
        return replace(self, **changed)

    def to(self, device: torch.device | str | None, *, non_blocking: bool = False) -> Self:
        """The same state on another device, None = its own.  Dtypes stay.  accelerate moves arguments by this method."""
        if not isinstance(device, str | torch.device | None):
            raise TypeError(f"device: expected a device, got {device!r}")
        return self._map(lambda _, tensor: tensor.to(device=device, non_blocking=non_blocking))

    def detach(self) -> Self:
        """The state without its autograd graph, for truncated back-propagation through chunks."""
        return self._map(lambda _, tensor: tensor.detach())

    def checkpoint(self) -> Self:
        """A copy to `restore` later.  It stays valid where CUDA graphs reuse the memory of this state."""
        return self._map(lambda _, tensor: tensor.clone())

    def restore(self, saved: Self) -> Self:
        """A copy of `saved`.  Raises ValueError or TypeError unless `saved` has this state's shapes, dtypes and options."""
        self._refuse_other("saved", saved)
        return saved.checkpoint()

    def reorder(self, rows: Tensor) -> Self:
        """The state of these batch rows, [any] int64, repeats allowed: for beam search, and sequences that end or branch."""
        _check_rows(rows, "rows", self.length)
        return self._map(lambda _, tensor: tensor.index_select(0, rows))

    def put(self, rows: Tensor, other: Self) -> Self:
        """The state with these batch rows, [n] int64 and distinct, replaced by the n rows of `other`."""
        self._refuse_other("other", other, batch=False)
        _check_rows(rows, other.length.shape[0], self.length)
        theirs = other.tensors()
        return self._map(lambda name, tensor: tensor.index_copy(0, rows, theirs[name]))

    def crop(self, tokens: int | Tensor) -> Self:
        """The state before the last `tokens` tokens."""
        raise NotImplementedError


def register(state: Class) -> Class:
    """Class decorator: names the fields, and registers the class with pytree and torch.load."""
    state.TENSORS = tuple(each.name for each in fields(state) if each.type in (Tensor, Tensor | None))
    state.OPTIONS = tuple(each.name for each in fields(state) if each.name not in state.TENSORS)
    # torch.load(weights_only=True), the default, loads no other classes.
    torch.serialization.add_safe_globals([state])
    pytree.register_pytree_node(
        state,
        lambda value: (list(value.tensors().values()), _context(value)),
        lambda tensors, context: _from_leaves(state, tensors, *context),
        serialized_type_name=f"flexdma.{state.__name__}",
        # JSON has no tuples.
        to_dumpable_context=list,
        from_dumpable_context=lambda context: tuple(tuple(o) if isinstance(o, list) else o for o in context),
        flatten_with_keys_fn=lambda value: (
            [(pytree.GetAttrKey(name), tensor) for name, tensor in value.tensors().items()],
            _context(value),
        ),
    )
    return state


def _context(state: State) -> tuple[Any, ...]:
    """What pytree keeps of a state beside its tensors: whether it has biases, and its options."""
    return (state.bias is not None, *state.options().values())


def _from_leaves(state: type[State], tensors: Iterable[Tensor], has_bias: bool, *options: Any) -> State:
    names = [name for name in state.TENSORS if has_bias or name != "bias"]
    return state(**dict(zip(names, tensors, strict=True)), **dict(zip(state.OPTIONS, options, strict=True)))


def _check_rows(rows: Tensor, count: object, like: Tensor) -> None:
    checks.tensor("rows", rows, (count,), like)
    if rows.dtype != torch.int64:
        raise TypeError(f"rows: expected torch.int64, got {rows.dtype}")
