"""Tasks: symbols in, symbols to predict.  `TASKS` names them.

recall.py     pairs of key and value among noise, asked for later; stacked, in two positions, or overwritten
copying.py    tokens among noise, to be repeated in order
"""

from collections.abc import Mapping

from flexdma.tools.experiments.tasks.copying import Copying
from flexdma.tools.experiments.tasks.recall import Recall
from flexdma.tools.experiments.tasks.task import IGNORED, Batch, Task

__all__ = ["IGNORED", "TASKS", "Batch", "Copying", "Recall", "Task"]

TASKS: Mapping[str, type[Task]] = {"recall": Recall, "copying": Copying}
