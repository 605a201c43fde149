"""Sums of one layer over the calibration tokens: what its values and keys predict of the keys' future."""

import torch
from torch import Tensor

from flexdma.integrations.transformers.calibration.regression import RidgeSums
from flexdma.integrations.transformers.full_attention import ObservedAttention
from flexdma.integrations.transformers.future_peaks import FLOOR, LEAST_QUERIES, future_peaks, sampled_keys
from flexdma.integrations.transformers.key_energies import with_key_energies

# Every fifth sequence measures how well the fit of the others predicts.
HELD_OUT = 5
# A penalty on squared weights, in samples.
RIDGE = 10.0
# Samples per coefficient of the fit, at least.
SAMPLES = 4


class FutureOfKeys:
    """Sums over the keys of one layer.

    The target of a key is log(FLOOR + its peak), see `future_peaks`.
    """

    def __init__(self, num_kv_heads: int, num_features: int, far: int, *, reads_keys: bool) -> None:
        """num_features: of a key in one head, of its value or, with reads_keys, of `with_key_energies`."""
        self.far, self.reads_keys = far, reads_keys
        self.fitted = RidgeSums(num_kv_heads * num_features, num_kv_heads)
        self.held_out = RidgeSums(num_kv_heads * num_features, num_kv_heads)
        self.peaks = torch.zeros(num_kv_heads, dtype=torch.float64)
        self.sequences = 0

    def add(self, seen: ObservedAttention) -> None:
        """Add the keys of a pass."""
        peak = future_peaks(seen, self.far)
        keys = sampled_keys(seen.key.shape[2], self.far)
        features = seen.value[:, :, keys]
        if self.reads_keys:
            features = with_key_energies(seen.key[:, :, keys], features)
        for feature, target in zip(features, peak[:, :, keys], strict=True):
            sums = self.held_out if self.sequences % HELD_OUT == 1 else self.fitted
            sums.add(feature.transpose(0, 1).flatten(1), (target.T + FLOOR).log())
            self.peaks += target.double().sum(1).cpu()
            self.sequences += 1

    @property
    def mean_peak(self) -> Tensor:
        """[Hkv], the mean over keys of their largest future probability."""
        return self.peaks / (self.fitted.count + self.held_out.count)

    def fit(self) -> tuple[Tensor, Tensor]:
        """Weights [Hkv F + 1, Hkv] of the fit to all keys, and R squared [Hkv] of the fit without the held-out sequences.

        Raises ValueError for too few samples and for targets that are not finite.
        """
        needed = SAMPLES * len(self.fitted.features_features)
        if self.held_out.count == 0 or self.fitted.count < needed:
            raise ValueError(
                f"batches: expected at least two sequences and {needed:,} keys followed by {self.far + LEAST_QUERIES} "
                f"tokens, got {self.sequences} sequences and {self.fitted.count:,} keys beside those held out"
            )
        both = self.fitted + self.held_out
        if not (both.features_features.isfinite().all() and both.features_targets.isfinite().all()):
            raise ValueError("model: expected finite values and attention probabilities, got NaN or infinity")
        return both.solve(RIDGE), self.held_out.r_squared(self.fitted.solve(RIDGE))
