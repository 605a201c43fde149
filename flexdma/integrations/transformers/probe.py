"""Observe the attention layers of a model in two forward passes of three tokens.

Attribute names differ between model families, but all call the attention interface in the same way.  These calls show the
attention modules, their heads and arguments, their masks and their caches.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel

from flexdma.integrations.transformers.cache import given_cache
from flexdma.transforms import is_recorded

NAME = "flexdma_probe"
TOKENS = 3


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention interface.

    layer: the calling module.  query, key, value: [1, heads, TOKENS, size], unchanged.
    mask_function: transformers' mask function (b, h, q, kv) -> bool; None where the layer got another mask or none.
    own_mask: whether the model combined that function with one of its own.
    arguments: by name, those that are not None.
    cache: the cache that the layer got, after the forward pass; None for no cache.
    """

    layer: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask_function: Callable | None
    own_mask: bool
    arguments: dict[str, Any]
    cache: Cache | None


@dataclass(frozen=True)
class Observation:
    """The result of `observe`.

    calls: those of one forward pass, in order.  error: the exception that ended the pass, or None.
    mixes: whether the last token's output depends on another token although all attention returned 0; False for meta and
        fake tensors.
    """

    calls: list[AttentionCall]
    error: Exception | None = None
    mixes: bool = False


def observe(model: PreTrainedModel) -> Observation:
    """Run the model and record its calls of the attention interface.

    The second pass changes the second token, and adds an argument `dynamic_mask_cache` to the layers that the first pass
    found, as converted layers get it.  The recorded arguments then show which layers pass it on.  Weights, modes and configs
    stay the same.
    """
    first, second = _Record(), _Record()
    try:
        output = _forward(model, first, [], 0)
        if not first.calls:
            return Observation([])
        other = _forward(model, second, {call.layer: None for call in first.calls}, 1)
    except Exception as error:
        return Observation(first.calls, error)
    calls = second.calls
    if is_recorded(output):
        return Observation(calls)
    tolerance = torch.finfo(output.dtype).eps ** 0.5 * output.abs().max()
    return Observation(calls, mixes=bool((output - other).abs().max() > tolerance))


def _forward(model: PreTrainedModel, record: "_Record", layers: Iterable[nn.Module], change: int) -> Tensor:
    """The output of the last token, after adding `change` to the token before it."""
    device = _device(model)
    # The middle of the vocabulary, because special tokens are at its ends.
    tokens = torch.full((1, TOKENS), model.config.get_text_config(decoder=True).vocab_size // 2, device=device)
    tokens[:, 1] += change
    # The first token is padding, so that the model makes a mask.
    padding = (torch.arange(TOKENS, device=device) > 0).long()[None]
    with _set_up(model, record, layers, tokens.is_meta):
        return model(input_ids=tokens, attention_mask=padding, use_cache=True)[0][:, -1]


class _Record:
    """The calls, masks and caches of one forward pass."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []
        self.masks: list[tuple[Tensor, Callable, bool]] = []
        self.caches: dict[nn.Module, Cache | None] = {}

    def note_the_cache(self, module: nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        """Pre-hook of every module."""
        self.caches[module] = given_cache((*arguments, *named.values()))

    def pass_the_cache_on(self, module: nn.Module, arguments: tuple, named: dict[str, Any]) -> tuple[tuple, dict]:
        """Pre-hook of attention layers, as in converted models."""
        return arguments, {**named, "dynamic_mask_cache": self.caches.get(module)}

    def mask_of(self, given: object) -> tuple[Callable | None, bool]:
        """The mask function of a mask that a layer got, and whether the model combined it with its own."""
        for number, (made, function, own) in enumerate(self.masks):
            if given is made or _is_copy(given, made, number):
                return function, own
        return None, False


def _is_copy(given: object, made: Tensor, number: int) -> bool:
    """Whether `given` is a slice of this mask, or a copy on another device.  The number in each mask identifies it."""
    if not isinstance(given, Tensor) or given.dtype != made.dtype or given.shape[:3] != made.shape[:3]:
        return False
    return not is_recorded(given) and bool((given == number).all())


_record: ContextVar[_Record] = ContextVar("record")


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object = None, **arguments: Any
) -> tuple[Tensor, None]:
    """The attention interface of the probe: records the call and returns zeros."""
    record = _record.get()
    given = {name: value for name, value in arguments.items() if value is not None}
    function, own = record.mask_of(attention_mask)
    record.calls.append(AttentionCall(module, query, key, value, function, own, given, record.caches.get(module)))
    return value.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


def _mask(
    *,
    batch_size: int,
    kv_length: int,
    mask_function: Callable,
    use_vmap: bool = False,
    device: Any = None,
    **others: Any,
) -> Tensor:
    """The mask interface of the probe: [B, 1, 1, K] int64, filled with the number of the mask."""
    masks = _record.get().masks
    made = torch.full((batch_size, 1, 1, kv_length), len(masks), dtype=torch.int64, device=device)
    masks.append((made, mask_function, use_vmap))
    return made


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)


@contextmanager
def _set_up(model: PreTrainedModel, record: _Record, layers: Iterable[nn.Module], meta: bool) -> Iterator[None]:
    """While active, the model is in eval mode, without gradients, with the probe's interface and hooks."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    configs = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}.values()
    attention = [(c, c._attn_implementation) for c in configs if hasattr(c, "_attn_implementation")]
    # The other implementations of experts read values, and a model on meta has none.
    experts = [(c, c._experts_implementation) for c, _ in attention if meta and hasattr(c, "_experts_implementation")]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.callback(_record.reset, _record.set(record))
        for module in modules:
            stack.callback(module.register_forward_pre_hook(record.note_the_cache, with_kwargs=True).remove)
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(record.pass_the_cache_on, with_kwargs=True).remove)
        try:
            model.eval()
            for config, _ in attention:
                config._attn_implementation = NAME
            for config, _ in experts:
                config._experts_implementation = "batched_mm"
            yield
        finally:
            for config, implementation in attention:
                config._attn_implementation = implementation
            for config, implementation in experts:
                config._experts_implementation = implementation
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode


def _device(model: PreTrainedModel) -> torch.device:
    """The device for inputs: that of the first weight not on meta, else the CPU if weights are offloaded, else meta."""
    devices = [parameter.device for parameter in model.parameters()]
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu" if offloaded else "meta"))
