"""Windows and slopes of all heads, by what they change of the model's attention outputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2

import torch
from torch import Tensor

from flexdma.integrations.transformers.calibration.budget import divided
from flexdma.integrations.transformers.calibration.future import FutureOfKeys
from flexdma.lifespans import Selection

# A window is at least mean / 32 and at most 4 means; a cache has as many slots for all heads of a layer as for its widest.
NARROWEST, WIDEST = 32, 4
# Sizes at which errors are measured, per doubling.
PER_DOUBLING = 2


@dataclass(frozen=True, eq=False)
class HeadErrors:
    """What windows and slopes change of one layer's outputs.

    sizes: windows, ascending.  errors: [slopes, sizes, Hkv] float64, see `FutureOfKeys.errors`.
    """

    sizes: list[int]
    errors: Tensor

    @classmethod
    def of(
        cls, future: FutureOfKeys, weights: Tensor, slopes: Sequence[float], selection: Selection, mean: int | None
    ) -> "HeadErrors":
        """Those of a layer.  mean: of the windows of all heads; None = the selection has the windows."""
        if mean is None:
            assert selection.window_size is not None
            given = selection.window_size
            sizes = sorted(set(given)) if isinstance(given, tuple) else [given]
        else:
            sizes = measured_sizes(mean)
        return cls(sizes, future.errors(weights, slopes, sizes, sinks=selection.sinks, recent=selection.recent))

    def best(self, windows: Sequence[int]) -> tuple[list[int], list[float]]:
        """For each head the number of its best slope and the error with it, at the largest measured size in its window."""
        numbers = torch.searchsorted(torch.tensor(self.sizes), torch.tensor(windows), right=True) - 1
        of_heads = self.errors.gather(1, numbers.expand(len(self.errors), 1, -1))[:, 0]
        least = of_heads.min(0)
        return least.indices.tolist(), least.values.tolist()


def measured_sizes(mean: int) -> list[int]:
    """The windows at which errors are measured: between the bounds in equal ratios."""
    fewest, most = (round(log2(bound) * PER_DOUBLING) for bound in (1 / NARROWEST, WIDEST))
    sizes = (mean * 2 ** (torch.arange(fewest, most + 1) / PER_DOUBLING)).round().long().clamp(min=1)
    return sizes.unique().tolist()


def windows_of_least_error(mean: int, layers: Sequence[HeadErrors], bounds: Sequence[int]) -> list[list[int]]:
    """Windows [layers][heads] of this mean, each at most the layer's bound."""
    heads = [layer.errors.shape[2] for layer in layers]
    widest = torch.tensor([min(bound, WIDEST * mean) for bound in bounds])
    errors = torch.cat([layer.errors.amin(0) for layer in layers], 1)
    windows = divided(mean * sum(heads), layers[0].sizes, errors, widest.repeat_interleave(torch.tensor(heads)))
    return [part.tolist() for part in windows.split(heads)]
