"""What a page draws: a text as tokens, and for each layer and KV head of each model lifespans, gates and attention.

Nothing is query by key: a lifespan is two integers per key, a gate one number, and attention a few numbers per query.  Arrays
are little-endian numbers in base64, which the page decodes when it shows their head.
"""

import base64
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexdma.lifespans import Lifespans
from flexdma.tools.refusal import RefusedError
from flexdma.tools.view.attended import TOP, Attended
from flexdma.tools.view.labels import Labels

STEPS = 2**16 - 1  # a probability is stored as a whole number of these
LONGEST = 2**12  # tokens of a page, so that a browser keeps up with the mouse


class ShownText(NamedTuple):
    """A part of a text: the name of its file, what its tokens are called, and of the file's tokens the first that is shown,
    the number that are shown, and the number of all.  The labels have the first tokens of a tokenizer too.
    """

    file: str
    unit: str
    start: int
    shown: int
    total: int
    labels: Labels


class ShownLayer(NamedTuple):
    """One layer.

    capacities: the most keys that a query of each KV head sees; None = all.  lifespans, gate: [1, Hkv, N].
    attended: None where no full model belongs to this one.
    """

    capacities: Sequence[int | None]
    lifespans: Lifespans
    gate: Tensor
    attended: Attended | None = None


class ShownModel(NamedTuple):
    """A model under the name that the page has for it."""

    label: str
    layers: Sequence[ShownLayer]


def view_record(text: ShownText, models: Iterable[ShownModel]) -> dict[str, Any]:
    """The data of the page, in types that JSON has.

    Key j is visible to query i  <=>  birth[j] <= i < death[j], with positions counted from the first shown token.  All heads
    share birth, because keys are born at their own positions.
    Raises RefusedError where the attention of a full model is NaN.
    """
    length = len(text.labels.tokens)
    return {
        "file": text.file,
        "unit": text.unit,
        "start": text.start,
        "shown": text.shown,
        "total": text.total,
        "tokens": text.labels.tokens,
        "continuations": text.labels.continuations,
        "lineEnds": text.labels.line_ends,
        "birth": list(range(length)),
        "steps": STEPS,
        "models": [_model(one, length) for one in models],
    }


def bytes_of_page(heads: int, length: int) -> int:
    """About the size of the page of a converted model."""
    return heads * length * (2 + 4 + 2 + 4 * min(TOP, length)) * 4 // 3


def _model(model: ShownModel, length: int) -> dict[str, Any]:
    for number, layer in enumerate(model.layers):
        if layer.attended is not None and not layer.attended.probabilities.isfinite().all():
            raise RefusedError(f"--model: expected finite attention of the full model, got NaN in layer {number}")
    return {"label": model.label, "layers": [_layer(layer, length) for layer in model.layers]}


def _layer(layer: ShownLayer, length: int) -> list[dict[str, Any]]:
    birth, death = layer.lifespans
    assert length < 2**16
    assert torch.equal(birth, torch.arange(length).expand_as(birth))
    return [
        {
            "capacity": capacity,
            "death": _packed("H", death[0, head]),
            "gate": _packed("f", layer.gate[0, head].float()),
            "attended": None if layer.attended is None else _attended(layer.attended, head),
        }
        for head, capacity in enumerate(layer.capacities)
    ]


def _attended(attended: Attended, head: int) -> dict[str, Any]:
    return {
        "keys": _packed("H", attended.keys[head]),
        "probabilities": _packed("H", _steps(attended.probabilities[head])),
        "onKept": _packed("H", _steps(attended.on_kept[head])),
        "mean": round(attended.mean_on_kept[head].item(), 4),
    }


def _steps(probabilities: Tensor) -> Tensor:
    return (probabilities.clamp(0, 1) * STEPS).round().int()


def _packed(kind: str, numbers: Tensor) -> str:
    """kind: of the struct module, "H" = 16 bits without sign, "f" = 32 bits with NaN and infinities."""
    return base64.b64encode(struct.pack(f"<{numbers.numel()}{kind}", *numbers.flatten().tolist())).decode()
