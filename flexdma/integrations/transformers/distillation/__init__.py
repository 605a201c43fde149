"""Train gates and adapters of a converted model to the full attention of the same weights."""

from flexdma.integrations.transformers.distillation.distill import distill
from flexdma.integrations.transformers.distillation.record import Distillation
from flexdma.integrations.transformers.distillation.trainer import DistillTrainer

__all__ = ["DistillTrainer", "Distillation", "distill"]
