"""Tasks: symbols in, symbols to predict.

recall.py     pairs of key and value among noise, asked for later; stacked, in two positions, or overwritten
copying.py    tokens among noise, to be repeated in order
needles.py    numbers hidden among letters, at any length
language.py   the next byte of real text; corpora.py: which
"""

from flexdma.tools.experiments.tasks.copying import Copying
from flexdma.tools.experiments.tasks.language import Language
from flexdma.tools.experiments.tasks.needles import Needles
from flexdma.tools.experiments.tasks.recall import Recall
from flexdma.tools.experiments.tasks.task import IGNORED, Batch, Task

__all__ = ["IGNORED", "Batch", "Copying", "Language", "Needles", "Recall", "Task"]
