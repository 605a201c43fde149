"""The numbers that the page draws: tokens, birth and death of each key, gates, for every layer and head."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from flexdma.tools.byte_models.checkpoint import Trained
from flexdma.tools.byte_models.labels import CONTINUATION, byte_labels
from flexdma.tools.byte_models.model import layer_gates


def view_record(name: str, content: bytes, start: int, length: int, trained: Iterable[Trained]) -> dict[str, Any]:
    """The lifespans and gates of the models for `length` bytes from `start`, in types that JSON has.

    Key j is visible to query i  <=>  birth[j] <= i < death[j], with positions counted from `start`.  All models and heads
    share birth, because keys are born at their own positions.
    """
    shown = content[start : start + length]
    tokens = byte_labels(shown)
    return {
        "file": name,
        "start": start,
        "total": len(content),
        "tokens": tokens,
        "continuations": [j for j, token in enumerate(tokens) if token == CONTINUATION and shown[j] & 0xC0 == 0x80],
        "lineEnds": [j for j, byte in enumerate(shown) if byte == ord("\n")],
        "birth": list(range(len(shown))),
        "models": [_model_record(one, shown) for one in trained],
    }


def _model_record(trained: Trained, shown: bytes) -> dict[str, Any]:
    tokens = torch.tensor([list(shown)])
    layers = layer_gates(trained.model, tokens)
    for _, alive in layers:
        assert torch.equal(alive.birth, torch.arange(len(shown)).expand_as(alive.birth))
    return {
        "label": trained.label,
        "window": trained.model.sizes.window,
        "layers": [
            [
                {"death": alive.death[0, head].tolist(), "gate": [_number(value) for value in gate[0, head].tolist()]}
                for head in range(gate.shape[1])
            ]
            for gate, alive in layers
        ],
    }


def _number(value: float) -> float | str:
    """Seven digits.  JSON has no NaN and no infinities, so these become strings for JavaScript's Number()."""
    if math.isfinite(value):
        return float(f"{value:.7g}")
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
