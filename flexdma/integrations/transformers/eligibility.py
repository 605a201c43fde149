"""The models that `convert_to_dma` accepts.  Each refusal names what was observed in the model.

The model's own forward pass (`probe`) decides, not its name or attributes, so that families which transformers adds later
are converted correctly or refused for a property that they have.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from flexdma.integrations.transformers.layer_selections import argument_at
from flexdma.integrations.transformers.probe import TOKENS, AttentionCall, observe
from flexdma.lifespans import Selection

# A bound above any window.
UNBOUNDED = 2**20
LAYER_TYPES = {"full_attention", "sliding_attention"}
# Arguments of the attention interface that flexdma computes, or that change nothing in attention.
ARGUMENTS = {
    "scaling", "dropout", "softcap", "s_aux", "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache",
    "dynamic_mask_cache",
}  # fmt: skip


def attention_calls(model: PreTrainedModel) -> list[AttentionCall]:
    """One call of the attention interface per attention layer of the model, in order of `layer_idx`.

    Raises TypeError or ValueError naming the operation of the model that flexdma does not compute.
    """
    _check_model(model)
    observed = observe(model)
    calls, error, kind = observed.calls, observed.error, type(model).__name__
    if not calls:
        ended = "" if error is None else f"; its forward pass ended with {type(error).__name__}: {error}"
        raise TypeError(
            f"model: expected attention layers that call the attention interface, got {kind}{ended}"
        ) from error
    if error is not None:
        raise TypeError(
            f"model: expected a forward pass of token ids, attention_mask and use_cache=True, got {kind}, which raised "
            f"{type(error).__name__}: {error}"
        ) from error
    for layer, count in Counter(call.layer for call in calls).items():
        if count > 1:
            raise TypeError(
                "model: expected layers that call the attention interface once, "
                f"got {type(layer).__name__}, which calls it {'twice' if count == 2 else f'{count} times'}"
            )
    if not (model._supports_attention_backend or model._supports_sdpa):
        raise TypeError(
            f"model: expected one that computes plain attention, got {kind}, in which both _supports_attention_backend and "
            "_supports_sdpa are False"
        )
    if observed.mixes:
        raise TypeError(
            f"model: expected attention as the only operation across tokens, got {kind}, which has another one"
        )
    for call in calls:
        _check_layer(model, call)
        _check_arguments(call)
        _check_mask(model, call)
    _check_cache(calls)
    return sorted(calls, key=lambda call: call.layer.layer_idx)


def refuse_wider_windows(
    calls: Sequence[AttentionCall], selections: Sequence[Selection], choice: dict[str, Any]
) -> None:
    """Raise ValueError where a layer's own sliding window is smaller than its widest window with its recent tokens.

    choice: the arguments as given, for the message.
    """
    for number, (call, selection) in enumerate(zip(calls, selections, strict=True)):
        window, recent = selection.widest, selection.recent
        if window is not None and _sees(call, window + recent - 1, 0):
            continue
        if (own := _own_window(call, UNBOUNDED)) == UNBOUNDED:
            continue
        if recent and recent >= own:
            raise ValueError(
                f"{argument_at('recent', choice, number)}: expected less than the model's own sliding window of {own}, "
                f"got {recent}"
            )
        rest = f", less recent={recent}" if recent else ""
        raise ValueError(
            f"{argument_at('window_size', choice, number)}: expected at most the model's own sliding window of {own}{rest}, "
            f"got {window}"
        )


def own_windows(calls: Sequence[AttentionCall]) -> dict[Any, int]:
    """The sliding window of the model's own of each attention layer; UNBOUNDED without one.

    For passes with full attention.  Raises ValueError for learned sinks.
    """
    if any(call.arguments.get("s_aux") is not None for call in calls):
        raise ValueError("model: expected attention without learned sinks (s_aux), which take part of each probability")
    return {call.layer: _own_window(call, UNBOUNDED) for call in calls}


def _own_window(call: AttentionCall, bound: int) -> int:
    """The size of the layer's own sliding window, or `bound` if that is smaller."""
    return bisect_left(range(1, bound), True, key=lambda age: not _sees(call, age, 0)) + 1


def _check_model(model: PreTrainedModel) -> None:
    kind = type(model).__name__
    if any(hasattr(module, "keep_window_size") for module in model.modules()):
        raise TypeError(f"model: expected a model without gates, got {kind}; use_flexdma is for Doge")
    if model.config.is_encoder_decoder:
        raise TypeError(f"model: expected a decoder, got the encoder-decoder {kind}")
    types = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or LAYER_TYPES)
    if not types <= LAYER_TYPES:
        raise ValueError(f"config.layer_types: expected {sorted(LAYER_TYPES)}, got {sorted(types - LAYER_TYPES)}")


def _check_layer(model: PreTrainedModel, call: AttentionCall) -> None:
    layer, name = call.layer, type(call.layer).__name__
    if getattr(layer, "config", None) is not model.config:
        raise TypeError(
            f"model: expected a text decoder whose layers have the config of the model, got {type(model).__name__}, in which "
            f"{name} has another config"
        )
    if not isinstance(getattr(layer, "layer_idx", None), int):
        raise TypeError(f"model: expected layers that have their number in layer_idx, got {name}")
    if "dynamic_mask_cache" not in call.arguments:
        raise TypeError(
            f"model: expected layers that take a cache and pass unknown arguments on to the attention interface, got {name}"
        )


def _check_arguments(call: AttentionCall) -> None:
    kind, arguments = type(call.layer).__name__, call.arguments
    for name in sorted(arguments.keys() - ARGUMENTS):
        if arguments[name] is not False:
            raise ValueError(
                f"{name}: expected no such argument of the attention interface, as flexdma does not compute it, got one "
                f"from {kind}"
            )
    if not isinstance(arguments.get("scaling", 1.0), int | float):
        raise TypeError(f"scaling: expected a number, got {type(arguments['scaling']).__name__} from {kind}")
    sinks, heads = arguments.get("s_aux"), call.query.shape[1]
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"s_aux: expected [Hq] = [{heads}], got {list(sinks.shape)} from {kind}")
    if arguments.get("is_causal") is False:
        raise ValueError(f"is_causal: expected True, got False from {kind}")


def _check_mask(model: PreTrainedModel, call: AttentionCall) -> None:
    name = type(call.layer).__name__
    if call.mask_function is None:
        raise TypeError(
            f"attention_mask: expected the result of transformers' mask interface in the layers, got another mask in {name}"
        )
    if call.own_mask:
        raise ValueError(f"attention_mask: expected a causal mask with padding, got {name} with its own mask function")
    if _sees(call, 0, 1):
        raise ValueError(f"attention_mask: expected causal attention, got a bidirectional mask in {name}")
    chunk = getattr(model.config, "attention_chunk_size", None)
    if chunk is not None and not _sees(call, chunk, chunk - 1):
        raise ValueError(f"config.attention_chunk_size: expected None, got {chunk}")


def _sees(call: AttentionCall, query: int, key: int) -> bool:
    """Whether the layer's own mask lets this query see this key."""
    zero, i, j = (torch.tensor(number, device="cpu") for number in (0, query, key))
    return bool(call.mask_function(zero, zero, i, j))  # type: ignore[misc]


def _check_cache(calls: list[AttentionCall]) -> None:
    """Check that each call has its own layer of the cache, and that there are no other layers."""
    cache = calls[0].cache
    if cache is None or type(cache) is not DynamicCache:
        raise TypeError(f"cache: expected a model that makes a DynamicCache, got {type(cache).__name__}")
    for kept in cache.layers:
        if type(kept) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise TypeError(
                "cache: expected layers that each cache their own keys and values and nothing else, "
                f"got a {type(kept).__name__}"
            )
    if len({call.layer.layer_idx for call in calls}) < len(calls):
        raise TypeError("layer_idx: expected one number per attention layer, got one number for several")
    for call in calls:
        number = call.layer.layer_idx
        if number >= len(cache.layers) or not cache.layers[number].is_initialized or call.key.shape[2] != TOKENS:
            raise TypeError(
                "cache: expected layers that attend to the keys of their own tokens, got one of "
                f"{type(call.layer).__name__} that attends to other keys"
            )
