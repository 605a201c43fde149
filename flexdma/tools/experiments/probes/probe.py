"""What every probe provides."""

from typing import Any, Protocol

from flexdma.tools.experiments.model import SequenceModel


class Probe(Protocol):
    """A frozen dataclass of sizes."""

    def measure(self, model: SequenceModel, task: Any, *, is_last: bool) -> dict[str, Any]:
        """Numbers by name, as JSON has them.

        task: the one that the model is trained on.  is_last: whether this is the last evaluation.
        """
