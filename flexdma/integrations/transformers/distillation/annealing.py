"""Windows that shrink from the whole sequence to their final sizes during the first part of training."""

import math
from collections.abc import Mapping
from typing import Any

# With the final windows 8 sizes: compiled code compiles again for each, 8 times by default.
LEVELS = 7


class Annealing:
    """The windows of the layers of a converted model.

    own_windows: the sliding window of the model's own of each layer, a large number where there is none.
    share: of the steps, during which windows shrink; 0 = final windows from the first step on.
    """

    def __init__(self, own_windows: Mapping[Any, int], share: float) -> None:
        self.layers, self.own_windows, self.share, self.level = list(own_windows), own_windows, share, 0
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
        """Set the level of step 0 .. steps - 1: 0 = the whole sequence, LEVELS = the final windows."""
        shrinking = self.share * steps
        self.level = LEVELS if step >= shrinking else int(LEVELS * step / shrinking)

    def set_windows(self, tokens: int) -> None:
        """Set the windows of this level for a text of so many tokens."""
        for layer, final in zip(self.layers, self.final, strict=True):
            most = min(tokens, self.own_windows[layer] - layer.dynamic_mask_options["recent"])
            heads = [annealed(window, most, self.level) for window in (final if isinstance(final, tuple) else [final])]
            layer.dynamic_mask_options["window_size"] = tuple(heads) if isinstance(final, tuple) else heads[0]

    def end(self) -> None:
        """Set the final windows."""
        for layer, final in zip(self.layers, self.final, strict=True):
            layer.dynamic_mask_options["window_size"] = final


def annealed(final: int, longest: int, level: int) -> int:
    """The window at a level: from `longest` at level 0 along half a cosine to `final` at level LEVELS."""
    rest = (1 + math.cos(math.pi * level / LEVELS)) / 2
    return final + round(rest * max(longest - final, 0))
