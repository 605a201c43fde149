"""A small converted model, whose gates select, with its tokenizer in a folder."""

from pathlib import Path

import torch

from flexdma.integrations.transformers import convert_to_dma
from tests.tools.tiny_models import save, tiny_model

# Per layer and KV head; the second layer's is given as one number.
WINDOWS = [[4, 9], [7, 7]]
SINKS, RECENT = 2, [3, 0]


def choose_keys(model):
    """Draw gates that differ."""
    for module in model.modules():
        if hasattr(module, "value_gate"):
            torch.nn.init.normal_(module.value_gate.A)
    return model


def make_converted(folder: Path) -> Path:
    return save(folder, choose_keys(convert_to_dma(tiny_model(), [WINDOWS[0], 7], sinks=SINKS, recent=RECENT)))
