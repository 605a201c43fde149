"""`generate` with the bounded cache by default; continuous batching is refused.

transformers makes the cache of a `generate` call in one method of the model, and some models drop it in another.  This module
replaces the methods on the instance, because a subclass of the model would write its own name into saved configs.
"""

from copy import copy
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin

from flexdma.integrations.transformers.cache import DynamicMaskCache, given_cache
from flexdma.integrations.transformers.refusals import refuse_cache_kind


def bound_the_cache(model: nn.Module) -> None:
    """Make `generate` of this model use a DynamicMaskCache where the caller requests no other cache."""
    if isinstance(model, GenerationMixin):
        model._prepare_cache_for_generation = partial(_prepare_cache, model)
        model.prepare_inputs_for_generation = partial(_prepare_inputs, model)
        model.init_continuous_batching = _refuse_continuous_batching


def _refuse_continuous_batching(*_arguments: Any, **_named: Any) -> None:
    """In place of the method that `generate_batch` and the other ways into continuous batching call."""
    raise NotImplementedError(
        "continuous batching: expected a cache that keeps every key in pages, got a model of flexdma, whose states have "
        "slots per sequence and no pages (transformers issue 48305); use generate with a batch"
    )


def _prepare_cache(
    model: Any, generation_config: Any, model_kwargs: dict[str, Any], *others: Any, **named: Any
) -> None:
    implementation = generation_config.cache_implementation
    if implementation not in (None, "static", "dynamic"):
        raise ValueError(
            "cache_implementation: expected None or 'static', for DynamicMaskCache, or 'dynamic', which grows, got "
            f"{implementation!r}"
        )
    given = given_cache(model_kwargs.values())
    if given is not None:
        refuse_cache_kind(given)
    elif implementation == "static":
        # DynamicMaskCache already has static shapes; transformers would make a StaticCache.
        generation_config, implementation = copy(generation_config), None
        generation_config.cache_implementation = None
    type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *others, **named)
    if given is not None or implementation is not None:
        return
    for name, made in model_kwargs.items():
        if isinstance(made, DynamicCache):
            model_kwargs[name] = cache = DynamicMaskCache()
            if generation_config.is_assistant:
                cache.activate_past_recording()


def _prepare_inputs(model: Any, input_ids: Tensor, *others: Any, **kwargs: Any) -> dict[str, Any]:
    """As the model's own.  Where the model drops its cache, to read all tokens again with other frequencies, empty it."""
    inputs = type(model).prepare_inputs_for_generation(model, input_ids, *others, **kwargs)
    for name, cache in kwargs.items():
        if isinstance(cache, DynamicMaskCache) and given_cache(inputs.values()) is None:
            cache.reset()
            inputs[name] = cache
    return inputs
