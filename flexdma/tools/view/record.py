"""The numbers that the page draws: tokens, birth and death of each key, gates, for every layer and head."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from flexdma.tools.byte_models.checkpoint import Trained
from flexdma.tools.byte_models.labels import CONTINUATION, byte_labels
from flexdma.tools.byte_models.model import layer_gates


def view_record(name: str, content: bytes, start: int, length: int, trained: Iterable[Trained]) -> dict[str, Any]:
    """What the models keep of `length` bytes from `start`, as JSON can hold it.

    Key j is visible to query i  <=>  birth[j] <= i < death[j], positions counted from `start`; all models and heads share
    birth, because their keys stand in natural order.
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
    """Seven digits; JSON has no NaN and no infinities, so they go as what JavaScript's Number() reads."""
    if math.isfinite(value):
        return float(f"{value:.7g}")
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
