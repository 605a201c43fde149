"""Gates for an existing model by regression, from what its full attention looks back at."""

from flexdma.integrations.transformers.calibration.calibrate import Calibration, calibrate
from flexdma.integrations.transformers.calibration.recall_texts import recall_sequences

__all__ = ["Calibration", "calibrate", "recall_sequences"]
