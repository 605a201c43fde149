"""Samples of one layer from the calibration tokens: its keys, their values, and what the future made of them."""

import torch
from torch import Tensor

from flexdma.integrations.transformers.calibration.regression import explained_deviance, log_linear, standardized
from flexdma.integrations.transformers.full_attention import ObservedAttention
from flexdma.integrations.transformers.future_peaks import FLOOR, LEAST_QUERIES, future_peaks, sampled_keys
from flexdma.integrations.transformers.key_energies import gate_input_size, with_key_energies

# Every fifth sequence measures how well the fit of the others predicts.
HELD_OUT = 5
# A penalty on squared weights, in samples.  Targets are rare and large, so few samples decide and the penalty is large.
PENALTY = 10000.0
# Samples per coefficient of the fit, at least.
SAMPLES = 4


class FutureOfKeys:
    """The keys of one layer, in CPU memory, as large as a KV cache of the calibration tokens.

    The target of a key is FLOOR + its peak, see `future_peaks`.
    """

    def __init__(self, far: int, *, reads_keys: bool) -> None:
        """reads_keys: the features of a key are `with_key_energies`, not its value."""
        self.far, self.reads_keys = far, reads_keys
        self.device = torch.device("cpu")
        # Of each sequence: [Hkv, n, D], [Hkv, n, Dv], [Hkv, n].
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.peaks: list[Tensor] = []

    def add(self, seen: ObservedAttention) -> None:
        """Add the keys of a pass."""
        self.device = seen.value.device
        sampled = sampled_keys(seen.key.shape[2], self.far)
        peaks = future_peaks(seen, self.far)
        # Clones, because a slice would keep all keys of the pass alive.
        of_all = ((self.keys, seen.key), (self.values, seen.value), (self.peaks, peaks[..., None]))
        for kept, given in of_all:
            kept += given[:, :, sampled].to("cpu", copy=True).unbind()

    @property
    def mean_peak(self) -> Tensor:
        """[Hkv], the mean over keys of their largest future probability."""
        return torch.cat(self.peaks, 1)[..., 0].double().mean(1)

    def fit(self) -> tuple[Tensor, Tensor]:
        """Weights [Hkv F, Hkv] of the fit to all keys, and R squared [Hkv] of the fit without the held-out sequences.

        Raises ValueError for too few samples and for targets that are not finite.
        """
        fitted, needed = sum(peak.shape[1] for number, peak in enumerate(self.peaks) if not _is_held_out(number)), 0
        if self.peaks:
            size = gate_input_size(self.keys[0][None], self.values[0][None], self.reads_keys)
            needed = SAMPLES * (len(self.keys[0]) * size + 1)
        if len(self.peaks) < 2 or fitted < needed:
            raise ValueError(
                f"batches: expected at least two sequences and {needed:,} keys followed by {self.far + LEAST_QUERIES} "
                f"tokens, got {len(self.peaks)} sequences and {fitted:,} keys beside those held out"
            )
        features, targets = self._features(), torch.cat(self.peaks, 1)[..., 0].mT.float().to(self.device) + FLOOR
        if not (features.isfinite().all() and targets.isfinite().all()):
            raise ValueError("model: expected finite values and attention probabilities, got NaN or infinity")
        held_out = torch.cat(
            [torch.full((peak.shape[1],), _is_held_out(number)) for number, peak in enumerate(self.peaks)]
        ).to(self.device)
        x, deviation = standardized(features)
        part = log_linear(x[~held_out], targets[~held_out], PENALTY)
        r_squared = explained_deviance(x[held_out], targets[held_out], part)
        weights = log_linear(x, targets, PENALTY)
        return weights[:-1] / deviation[:, None], r_squared

    def _features(self) -> Tensor:
        """[n, Hkv F] float32 of all keys."""
        keys, values = (torch.cat(parts, 1).to(self.device) for parts in (self.keys, self.values))
        features = with_key_energies(keys[None], values[None])[0] if self.reads_keys else values.float()
        return features.transpose(0, 1).flatten(1)


def _is_held_out(sequence: int) -> bool:
    return sequence % HELD_OUT == 1
