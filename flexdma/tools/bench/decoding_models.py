"""Decoding and prefill by a whole model of transformers, with full key/value caches and with a DynamicMaskCache."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexdma import DynamicMaskState
from flexdma.tools.bench.decoding import (
    GROWING,
    OURS,
    SCALE,
    SLOPE,
    STATIC,
    Decoder,
    contender,
    made_at_first_call,
)
from flexdma.tools.language_models import cache_argument

MODEL_TOKENS = 2  # of one timed run; a growing cache grows on by a few keys
SPARE = 256  # slots of a StaticCache beyond N


def models(decoder: Decoder, dtype: torch.dtype) -> tuple[Any, Any]:
    """A Llama with random weights, and the same converted, with the same weights in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from flexdma.integrations.transformers import convert_to_dma

    longest = max(decoder.contexts) + SPARE
    config = LlamaConfig(
        vocab_size=decoder.vocabulary, hidden_size=decoder.hidden, intermediate_size=decoder.intermediate,
        num_hidden_layers=decoder.layers, num_attention_heads=decoder.query_heads, num_key_value_heads=decoder.heads,
        head_dim=decoder.size, tie_word_embeddings=True, max_position_embeddings=longest, attn_implementation="sdpa",
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    full = LlamaForCausalLM(config).to(dtype).eval()
    windows = [decoder.window_size(layer) for layer in range(decoder.layers)]
    gates: dict[str, Any] = {"form": "identity", "recency": "slope", "reads_keys": True} if decoder.calibrated else {}
    converted = convert_to_dma(copy.deepcopy(full), windows, sinks=decoder.sinks, recent=decoder.recent, **gates)
    if decoder.calibrated:
        _calibrate(converted, decoder)
    own = dict(full.named_parameters())
    for name, parameter in converted.named_parameters():
        if name in own:
            parameter.data = own[name].data
    return full, converted


@torch.no_grad()
def _calibrate(model: Any, decoder: Decoder) -> None:
    """Give the gates of a model with random weights the scale and slope of calibrated ones."""
    from flexdma.integrations.transformers.converted import converted_layers

    # Hidden states are normalised, and the weights before a gate have this standard deviation.
    spread = model.config.initializer_range * (decoder.hidden * decoder.heads * decoder.size) ** 0.5
    for layer in converted_layers(model):
        layer.value_gate.A.fill_(SCALE)
        layer.value_gate.slope.fill_(SCALE * SLOPE)
        layer.value_gate.dt_proj.weight.normal_(std=1 / spread)
        # Energies are as large as this whatever the weights are.
        layer.value_gate.dt_proj.weight.unflatten(1, (decoder.heads, -1))[..., decoder.size :] *= spread / 10


def model_calls(decoder: Decoder, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Contender -> a run of MODEL_TOKENS tokens of a whole model."""
    full, converted = models(decoder, dtype)
    ids = torch.zeros(decoder.batch, 1, dtype=torch.int64)
    # Each cache has its own compiled function, as in a program that uses one.
    functions = {name: _callable(model, decoder.compiled) for name, model in
                 ((GROWING, full), (STATIC, full), (OURS, converted))}  # fmt: skip
    calls: dict[str, Callable[[], object]] = {}
    for context in decoder.contexts:
        for name, function in functions.items():
            calls[contender(context, name)] = made_at_first_call(_tokens(decoder, context, name, function, full, ids))
    return calls


def _callable(model: Any, compiled: bool) -> Callable:
    def forward(ids: Tensor, cache: Any) -> Tensor:
        return model(ids, **{cache_argument(): cache}).logits

    return torch.compile(forward) if compiled else forward


def _tokens(
    decoder: Decoder, context: int, name: str, function: Callable, model: Any, ids: Tensor
) -> Callable[[], Callable[[], object]]:
    def make() -> Callable[[], object]:
        cache = filled_cache(decoder, context, name, model)

        def run() -> None:
            for _ in range(MODEL_TOKENS):
                function(ids, cache)

        return run

    return make


def filled_cache(decoder: Decoder, context: int, name: str, model: Any) -> Any:
    """A cache of this kind after `context` tokens."""
    from transformers import DynamicCache, StaticCache

    from flexdma.integrations.transformers import DynamicMaskCache
    from flexdma.integrations.transformers.cache_layer import DynamicMaskLayer

    dtype = model.dtype
    if name == OURS:
        ours = DynamicMaskCache()
        states: dict[int | tuple[int, ...], DynamicMaskState] = {}  # one for each window; layers get copies
        for number in range(decoder.layers):
            window = decoder.window_size(number)
            if window not in states:
                states[window] = decoder.state(context, dtype, number)
            layer = DynamicMaskLayer()
            layer.state, layer.tokens, layer.is_initialized = states[window].checkpoint(), context, True
            ours.layers.append(layer)
        return ours
    decoder.check_fits(context, decoder.layers, dtype)
    cache: Any = DynamicCache() if name == GROWING else StaticCache(config=model.config, max_cache_len=context + SPARE)
    key, value = decoder.keys(context, dtype), decoder.keys(context, dtype)
    for index in range(decoder.layers):  # copies: drawing numbers for each layer would take longer than the measurement
        cache.update(key.clone(), value.clone(), index)
    return cache


def prefill_calls(decoder: Decoder, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Contender -> one forward pass over N tokens with an empty cache, of which the last token's logits are computed."""
    from transformers import DynamicCache

    from flexdma.integrations.transformers import DynamicMaskCache

    full, converted = models(decoder, dtype)
    calls: dict[str, Callable[[], object]] = {}
    for context in decoder.contexts:
        ids = torch.randint(decoder.vocabulary, (decoder.batch, context))
        for name, model, kind in ((GROWING, full, DynamicCache), (OURS, converted, DynamicMaskCache)):
            calls[contender(context, name)] = _prefill(model, kind, ids)
    return calls


def _prefill(model: Any, kind: Callable[[], Any], ids: Tensor) -> Callable[[], object]:
    return lambda: model(ids, logits_to_keep=1, **{cache_argument(): kind()}).logits
