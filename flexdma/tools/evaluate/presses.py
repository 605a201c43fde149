"""NVIDIA kvpress (https://github.com/NVIDIA/kvpress): full attention to the context, whose cache is then compressed.

A press reads the whole context in full, so its memory is bounded only afterwards, and it has no likelihood by position.  The
question is read after the compression, as in kvpress's own evaluation.
"""

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexdma.tools.language_models import cache_argument
from flexdma.tools.long_context.contenders import AFTER_PREFILL, Contender
from flexdma.tools.long_context.needles import Needle
from flexdma.tools.timing import in_one_line

# Name of the class without "Press": whether it has sinks.
PRESSES = {"SnapKV": False, "ExpectedAttention": True, "Knorm": False, "StreamingLLM": True, "ObservedAttention": False}
READS_SCORES = "ObservedAttention"  # needs the probabilities of eager attention
PROBE = 128  # tokens


def why_unavailable() -> str | None:
    """Why kvpress cannot be used here; None if it can.  Its own metadata decides which transformers it takes."""
    if importlib.util.find_spec("kvpress") is None:
        return (
            "needs kvpress: pip install 'flexdma[kvpress]' in an environment of its own, and join the results by --join"
        )
    from packaging.requirements import Requirement

    installed = importlib.metadata.version("transformers")
    for text in importlib.metadata.requires("kvpress") or []:
        needed = Requirement(text)
        if needed.name == "transformers" and installed not in needed.specifier:
            return (
                f"kvpress {importlib.metadata.version('kvpress')} needs transformers {needed.specifier}, got {installed}: "
                "measure it in an environment of its own, and join the results by --join"
            )
    return None


@dataclass(frozen=True)
class PressContender(Contender):
    """A model whose cache a press compresses after the context.  sinks: of presses that have them."""

    sinks: int = 0

    def nll(self, ids: Tensor) -> Tensor | None:
        """None: while it reads, it is full attention."""
        return None

    @torch.no_grad()
    def answer(self, needle: Needle) -> Tensor:
        """Logits [a, V] after the compressed context, the question, and the answer before each."""
        device = self.model.device
        cache = self.prefill(needle.context[None].to(device))
        asked = torch.cat([needle.question, needle.answer])[None].to(device)
        position = len(needle.context) + torch.arange(asked.shape[1], device=device)[None]
        logits = self.model(input_ids=asked, position_ids=position, **{cache_argument(): cache}).logits[0]
        return logits[len(needle.question) - 1 : -1]

    def prefill(self, ids: Tensor) -> Any:
        """The compressed cache after the tokens ids [1, N]."""
        cache = self.new_cache()
        with (
            _attention(self.model, "eager" if self.name == READS_SCORES else None),
            self._press(ids.shape[1])(self.model),
        ):
            self.model(input_ids=ids, logits_to_keep=1, **{cache_argument(): cache})
        kept = {layer.keys.shape[2] for layer in cache.layers}
        expected = {min(ids.shape[1], int(self.keys or 0))}
        if kept != expected:
            raise RuntimeError(f"{self.name}: expected {expected} keys per head in all layers, got {kept}")
        return cache

    def _press(self, length: int) -> Any:
        import kvpress

        # kvpress keeps int(length * (1 - ratio)) keys: half a key more guards against rounding.
        ratio = max(0.0, 1 - (int(self.keys or 0) + 0.5) / length)
        sinks = {"n_sink": self.sinks} if PRESSES[self.name] else {}
        return getattr(kvpress, f"{self.name}Press")(compression_ratio=ratio, **sinks)


def presses(model: Any, names: Sequence[str], keys: int, sinks: int) -> tuple[list[Contender], dict[str, str]]:
    """The presses that work for this model, and the reasons of the others."""
    from transformers import DynamicCache

    working: list[Contender] = []
    failed = {}
    for name in names:
        try:
            small = PressContender(name, model, PROBE // 2, AFTER_PREFILL, DynamicCache, sinks)
            with torch.no_grad():
                small.prefill(torch.zeros(1, PROBE, dtype=torch.int64, device=model.device))
        except Exception as error:  # another package's, for a model that it may not know
            failed[name] = in_one_line(error)
        else:
            working.append(PressContender(name, model, keys, AFTER_PREFILL, DynamicCache, sinks))
    return working, failed


@contextmanager
def _attention(model: Any, implementation: str | None) -> Iterator[None]:
    """Inside, the model computes attention in this way; None = as before."""
    if implementation is None:
        yield
        return
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
