"""A stand-in for NVIDIA kvpress, with its interface: a press is called with a model, and cuts its cache in the prefill."""

import types
from contextlib import contextmanager
from dataclasses import dataclass

from transformers import Cache


@dataclass
class StreamingLLMPress:
    """Keeps the first `n_sink` keys and the last ones."""

    compression_ratio: float = 0.0
    n_sink: int = 4

    @contextmanager
    def __call__(self, model):
        def cut(layer, args, kwargs, output):
            held = next(each for each in kwargs.values() if isinstance(each, Cache)).layers[layer.layer_idx]
            length = held.keys.shape[2]
            kept = int(length * (1 - self.compression_ratio))
            if kept < length:
                places = [*range(self.n_sink), *range(length - kept + self.n_sink, length)]
                held.keys, held.values = held.keys[:, :, places], held.values[:, :, places]

        hooks = [layer.self_attn.register_forward_hook(cut, with_kwargs=True) for layer in model.model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@dataclass
class KnormPress:
    """Fails, as a press does for a model that it does not know."""

    compression_ratio: float = 0.0

    def __call__(self, model):
        raise NotImplementedError(f"no press for {type(model).__name__}")


def module() -> types.ModuleType:
    """The module, to put into sys.modules."""
    made = types.ModuleType("kvpress")
    made.StreamingLLMPress, made.KnormPress = StreamingLLMPress, KnormPress  # type: ignore[attr-defined]
    return made
