"""The models that are compared, each with one way to attend: full, sinks and a window, or as it was converted."""

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flexdma.tools import language_models
from flexdma.tools.language_models import LanguageModel, cache_argument
from flexdma.tools.long_context.needles import Needle
from flexdma.tools.long_context.passes import logits_after, nll_by_position
from flexdma.tools.refusal import refusing

FULL, WINDOW = "full", "sinks + window"
# From when on a cache is bounded.
NEVER, ALWAYS, AFTER_PREFILL = "never", "always", "after prefill"
# What a model of `calibrate` or `distill` has in its config.flexdma, the latest first.
MADE_BY = ("distilled", "calibrated")


@dataclass(frozen=True)
class Contender:
    """A model and its cache.

    keys: per KV head, on average over layers and heads; None = all keys.
    bounded: when the cache has at most so many keys: NEVER, ALWAYS, AFTER_PREFILL.
    """

    name: str
    model: Any
    keys: float | None
    bounded: str
    new_cache: Callable[[], Any]

    def nll(self, ids: Tensor) -> Tensor | None:
        """Negative log-likelihood [N - 1] of tokens 1 .. N - 1 of ids [1, N]; None where the contender has no such pass."""
        return nll_by_position(self.model, ids)

    def answer(self, needle: Needle) -> Tensor:
        """Logits [a, V], of which row i predicts token i of the answer, given all tokens before it."""
        first = needle.length - 1
        return logits_after(self.model, needle.ids, first, first + len(needle.answer))

    def prefill(self, ids: Tensor) -> Any:
        """A new cache after the tokens ids [1, N]."""
        cache = self.new_cache()
        self.model(input_ids=ids, logits_to_keep=1, **{cache_argument(): cache})
        return cache

    def decode(self, token: Tensor, cache: Any, position: Tensor) -> None:
        """One forward pass of token [1, 1] at position [1, 1]; the cache has it afterwards."""
        self.model(input_ids=token, position_ids=position, **{cache_argument(): cache})


def full(model: Any) -> Contender:
    """The model with full attention; of a converted model its weights without the gates."""
    from transformers import DynamicCache

    return Contender(FULL, language_models.full_attention(model), None, NEVER, DynamicCache)


def sinks_and_window(model: Any, budget: int, sinks: int) -> Contender:
    """The model of `full`, converted with gates that are all equal: the last `budget` keys and the first `sinks`.

    The weights stay shared.  Raises TypeError or ValueError where `convert_to_dma` refuses the model.
    """
    from flexdma.integrations.transformers import DynamicMaskCache, convert_to_dma

    plain = language_models.full_attention(model)
    weights = {id(tensor): tensor for tensor in (*plain.parameters(), *plain.buffers())}
    converted = convert_to_dma(copy.deepcopy(plain, weights), budget, sinks=sinks).eval()
    return Contender(WINDOW, converted, budget + sinks, ALWAYS, DynamicMaskCache)


def as_converted(loaded: LanguageModel, taken: frozenset[str] = frozenset()) -> Contender:
    """A converted model as it is, under a name that is not in `taken`."""
    from flexdma.integrations.transformers import DynamicMaskCache

    choice = loaded.choice or {}
    kind = next((made for made in MADE_BY if choice.get(made)), "converted")
    name = kind if kind not in taken else f"{kind} ({loaded.name})"
    return Contender(name, loaded.model, keys_per_head(loaded.model), ALWAYS, DynamicMaskCache)


def keys_per_head(model: Any) -> float:
    """The most keys that a query of a converted model sees, sinks and recent tokens included, on average over its heads."""
    from flexdma.integrations.transformers.converted import converted_layers, windows_per_head

    with refusing(ValueError):  # models without windows
        return statistics.fmean(
            window + layer.dynamic_mask_options["sinks"] + layer.dynamic_mask_options["recent"]
            for layer in converted_layers(model)
            for window in windows_per_head(layer)
        )
