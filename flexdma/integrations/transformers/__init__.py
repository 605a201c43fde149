"""Hugging Face transformers, 5.17 to 5.24 (extra `flexdma[transformers]`); docs/transformers.md has the recipes.

use_flexdma         compute the attention of Doge models with flexdma: same weights, same state_dict
convert_to_dma      add the gates of Dynamic Mask Attention to any decoder that calls the attention interface, for training
set_window_size     the windows of such a model, between its calls
calibrate           the same with gates by regression, which keep what the model's full attention will look back at
distill             train gates and adapters of a converted model to its full attention; DistillTrainer: by the Trainer
from_pretrained     load a saved model of either kind
DynamicMaskCache    the bounded key-value cache that `generate` uses with these models
"""

try:
    import transformers as _transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "transformers: expected to be installed, got none; pip install 'flexdma[transformers]'"
    ) from error

from flexdma.integrations.transformers.cache import DynamicMaskCache
from flexdma.integrations.transformers.calibration import Calibration, calibrate, recall_sequences
from flexdma.integrations.transformers.conversion import convert_to_dma
from flexdma.integrations.transformers.distillation import Distillation, DistillTrainer, distill
from flexdma.integrations.transformers.doge import use_flexdma
from flexdma.integrations.transformers.loading import from_pretrained
from flexdma.integrations.transformers.windows import set_window_size

__all__ = [
    "Calibration",
    "DistillTrainer",
    "Distillation",
    "DynamicMaskCache",
    "calibrate",
    "convert_to_dma",
    "distill",
    "from_pretrained",
    "recall_sequences",
    "set_window_size",
    "use_flexdma",
]
