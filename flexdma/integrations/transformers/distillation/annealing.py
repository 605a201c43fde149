"""Windows that shrink from the whole sequence to their final sizes during the first part of training."""

from collections.abc import Mapping
from typing import Any

from flexdma.annealing import annealed_window


class Annealing:
    """The windows of the layers of a converted model.

    own_windows: the sliding window of the model's own of each layer, a large number where there is none.
    share: of the steps, during which windows shrink; 0 = final windows from the first step on.
    """

    def __init__(self, own_windows: Mapping[Any, int], share: float) -> None:
        self.layers, self.own_windows, self.share, self.progress = list(own_windows), own_windows, share, 0.0
        self.final = [layer.dynamic_mask_options["window_size"] for layer in self.layers]

    @property
    def smallest(self) -> int:
        """The number of keys that every head keeps in the end, sinks and recent ones included."""
        return min(
            min(final if isinstance(final, tuple) else [final])
            + layer.dynamic_mask_options["sinks"]
            + layer.dynamic_mask_options["recent"]
            for final, layer in zip(self.final, self.layers, strict=True)
        )

    def start_step(self, step: int, steps: int) -> None:
        """Set the progress at step 0 .. steps - 1."""
        self.progress = step / steps

    def set_windows(self, tokens: int) -> None:
        """Set the windows of this step for a text of so many tokens."""
        for layer, final in zip(self.layers, self.final, strict=True):
            most = min(tokens, self.own_windows[layer] - layer.dynamic_mask_options["recent"])
            heads = [
                annealed_window(window, most, self.progress, self.share)
                for window in (final if isinstance(final, tuple) else [final])
            ]
            layer.dynamic_mask_options["window_size"] = tuple(heads) if isinstance(final, tuple) else heads[0]

    def end(self) -> None:
        """Set the final windows."""
        for layer, final in zip(self.layers, self.final, strict=True):
            layer.dynamic_mask_options["window_size"] = final
