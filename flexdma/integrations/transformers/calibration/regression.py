"""Ridge regression from sums over samples, so that no sample is kept."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class RidgeSums:
    """Sums over samples of features [n, F] and targets [n, H], from which a linear fit and its error follow.

    features_features [F + 1, F + 1], features_targets [F + 1, H], targets_targets [H]: float64; the last feature is 1.
    """

    num_features: int
    num_targets: int
    features_features: Tensor = field(init=False)
    features_targets: Tensor = field(init=False)
    targets_targets: Tensor = field(init=False)

    def __post_init__(self) -> None:
        F, H = self.num_features + 1, self.num_targets
        self.features_features = torch.zeros(F, F, dtype=torch.float64)
        self.features_targets = torch.zeros(F, H, dtype=torch.float64)
        self.targets_targets = torch.zeros(H, dtype=torch.float64)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add samples."""
        x = torch.cat([features.double(), torch.ones_like(features[:, :1], dtype=torch.float64)], dim=1)
        y = targets.double()
        self.features_features += (x.mT @ x).cpu()
        self.features_targets += (x.mT @ y).cpu()
        self.targets_targets += y.square().sum(0).cpu()

    def __add__(self, other: "RidgeSums") -> "RidgeSums":
        """The sums over the samples of both."""
        both = RidgeSums(self.num_features, self.num_targets)
        both.features_features = self.features_features + other.features_features
        both.features_targets = self.features_targets + other.features_targets
        both.targets_targets = self.targets_targets + other.targets_targets
        return both

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self.features_features[-1, -1])

    def solve(self, ridge: float) -> Tensor:
        """Weights [F + 1, H] of the best fit; the last row is the intercept.

        ridge: penalty on squared weights of features that are scaled to variance 1, in samples.
        """
        count = self.features_features[-1, -1]
        mean = self.features_features[-1, :-1] / count
        deviation = (self.features_features.diagonal()[:-1] / count - mean.square()).clamp(min=0).sqrt() + 1e-6
        # scaled = features @ to_scaled, with scaled features of mean 0 and variance 1.
        to_scaled = torch.diag(torch.cat([1 / deviation, torch.ones(1, dtype=torch.float64)]))
        to_scaled[-1, :-1] = -mean / deviation
        gram = to_scaled.mT @ self.features_features @ to_scaled
        gram.diagonal()[:-1] += ridge
        return to_scaled @ torch.linalg.solve(gram, to_scaled.mT @ self.features_targets)

    def r_squared(self, weights: Tensor) -> Tensor:
        """Share of the targets' variance [H] that these weights explain; 1 = all, 0 = as their mean, below 0 = worse.

        0 for targets that are all equal.
        """
        errors = (
            self.targets_targets
            - 2 * (weights * self.features_targets).sum(0)
            + (weights * (self.features_features @ weights)).sum(0)
        )
        variance = self.targets_targets - self.features_targets[-1].square() / self.features_features[-1, -1]
        varies = variance > 1e-12 * self.targets_targets
        return torch.where(varies, 1 - errors / variance.where(varies, variance.new_ones(())), 0.0)
