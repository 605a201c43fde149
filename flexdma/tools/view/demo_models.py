"""The byte models of the demo over a text, whose tokens are its bytes."""

from collections.abc import Iterable

import torch

from flexdma.tools.byte_models.checkpoint import Trained
from flexdma.tools.byte_models.model import layer_gates
from flexdma.tools.view.record import ShownLayer, ShownModel


def shown_models(trained: Iterable[Trained], content: bytes) -> list[ShownModel]:
    """The page's numbers of these models.  They are trained apart, so none is the full model of another."""
    tokens = torch.tensor([list(content)])
    return [_shown_model(one, tokens) for one in trained]


def _shown_model(trained: Trained, tokens: torch.Tensor) -> ShownModel:
    capacity = None if trained.model.kind == "full" else trained.model.sizes.window
    layers = layer_gates(trained.model, tokens)
    return ShownModel(trained.label, [ShownLayer([capacity] * gate.shape[1], kept, gate) for gate, kept in layers])
