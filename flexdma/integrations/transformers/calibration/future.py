"""Samples of one layer from the calibration tokens: keys, values, what the future made of them, and some queries."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flexdma.integrations.transformers.calibration.regression import explained_deviance, log_linear, standardized
from flexdma.integrations.transformers.calibration.window_errors import Looks, window_errors
from flexdma.integrations.transformers.full_attention import ObservedAttention
from flexdma.integrations.transformers.future_peaks import FLOOR, LEAST_QUERIES, future_peaks, sampled_keys
from flexdma.integrations.transformers.key_energies import gate_input_size, with_key_energies

# Every fifth sequence measures how well the fit of the others predicts.
HELD_OUT = 5
# A penalty on squared weights, in samples.  Targets are rare and large, so few samples decide and the penalty is large.
PENALTY = 10000.0
# Samples per coefficient of the fit, at least.
SAMPLES = 4
# Queries of a sequence that measure what windows cost: at equal distances, and in its last twelfth, where `recall_sequences`
# ask.
QUERIES, LAST_QUERIES = 24, 4


class FutureOfKeys:
    """The keys of one layer and some queries, in CPU memory, as large as a KV cache of the calibration tokens.

    The target of a key is FLOOR + its peak, see `future_peaks`.
    """

    def __init__(self, far: int, *, reads_keys: bool) -> None:
        """reads_keys: the features of a key are `with_key_energies`, not its value."""
        self.far, self.reads_keys = far, reads_keys
        self.device = torch.device("cpu")
        # Of each sequence: [Hkv, N], those that are samples.
        self.peaks: list[Tensor] = []
        self.looks: list[Looks] = []

    def add(self, seen: ObservedAttention) -> None:
        """Add the keys of a pass."""
        self.device = seen.value.device
        length = seen.key.shape[2]
        # Clones, because a slice would keep all of the pass alive.
        self.peaks += future_peaks(seen, self.far)[:, :, sampled_keys(length, self.far)].to("cpu", copy=True).unbind()
        at = measured_queries(length)
        scaling = seen.query.shape[-1] ** -0.5 if seen.scaling is None else seen.scaling
        for query, key, value in zip(seen.query[:, :, at.to(self.device)], seen.key, seen.value, strict=True):
            query, key, value = (given.to("cpu", copy=True) for given in (query, key, value))
            self.looks.append(Looks(at, query, key, value, scaling, seen.arguments.get("softcap"), seen.window))

    @property
    def mean_peak(self) -> Tensor:
        """[Hkv], the mean over keys of their largest future probability."""
        return torch.cat(self.peaks, 1).double().mean(1)

    def fit(self) -> tuple[Tensor, Tensor]:
        """Weights [Hkv F, Hkv] of the fit to all keys, and R squared [Hkv] of the fit without the held-out sequences.

        Raises ValueError for too few samples and for targets that are not finite.
        """
        fitted, needed = sum(peak.shape[1] for number, peak in enumerate(self.peaks) if not _is_held_out(number)), 0
        if self.peaks:
            key, value = self.looks[0].key, self.looks[0].value
            needed = SAMPLES * (len(key) * gate_input_size(key[None], value[None], self.reads_keys) + 1)
        if len(self.peaks) < 2 or fitted < needed:
            raise ValueError(
                f"batches: expected at least two sequences and {needed:,} keys followed by {self.far + LEAST_QUERIES} "
                f"tokens, got {len(self.peaks)} sequences and {fitted:,} keys beside those held out"
            )
        features = torch.cat(
            [self._features(looks)[sampled_keys(looks.key.shape[1], self.far)] for looks in self.looks]
        )
        targets = torch.cat(self.peaks, 1).mT.float().to(self.device) + FLOOR
        if not (features.isfinite().all() and targets.isfinite().all()):
            raise ValueError("model: expected finite values and attention probabilities, got NaN or infinity")
        held_out = torch.cat(
            [
                torch.full((peak.shape[1],), _is_held_out(number), device=self.device)
                for number, peak in enumerate(self.peaks)
            ]
        )
        x, deviation = standardized(features)
        part = log_linear(x[~held_out], targets[~held_out], PENALTY)
        r_squared = explained_deviance(x[held_out], targets[held_out], part)
        weights = log_linear(x, targets, PENALTY)
        return weights[:-1] / deviation[:, None], r_squared

    def errors(
        self, weights: Tensor, slopes: Sequence[float], windows: Sequence[int], *, sinks: int, recent: int
    ) -> Tensor:
        """[slopes, windows, Hkv] float64: what windows change of the outputs, as a share of their squares in the layer.

        weights: [Hkv F, Hkv] of `fit`.  Others as in `window_errors`.
        """
        changes = squares = torch.zeros((), dtype=torch.float64, device="cpu")
        for looks in self.looks:
            here = looks.to(self.device)
            gates = (self._features(here) @ weights.float()).mT
            change, square = window_errors(here, gates, slopes, windows, sinks=sinks, recent=recent)
            changes, squares = changes + change.cpu(), squares + square.cpu()
        return changes / squares.clamp(min=torch.finfo(torch.float64).tiny)

    def _features(self, looks: Looks) -> Tensor:
        """[N, Hkv F] float32 of all keys of a sequence."""
        key, value = looks.key.to(self.device), looks.value.to(self.device)
        features = with_key_energies(key[None], value[None])[0] if self.reads_keys else value.float()
        return features.transpose(0, 1).flatten(1)


def measured_queries(length: int) -> Tensor:
    """The positions of the queries that measure what windows cost, in a sequence of this length."""
    first, last = length // 8, length - 1
    evenly = torch.linspace(first, last, min(QUERIES, length - first), device="cpu")
    latest = torch.linspace(last - length // 12, last - 1, LAST_QUERIES, device="cpu")
    return torch.cat([evenly, latest]).long().clamp(min=0)


def _is_held_out(sequence: int) -> bool:
    return sequence % HELD_OUT == 1
