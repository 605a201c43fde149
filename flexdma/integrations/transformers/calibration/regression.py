"""Log-linear (Poisson) regression: the expectation of a target >= 0 is exp(x . b + c).

The best ranking for a window is by expectation.  A fit of the logarithm ranks by the expected logarithm instead, and drops
keys that are needed rarely and then entirely.
"""

import torch
from torch import Tensor

# Newton steps at most; they end when a step gains less than this share of a unit of deviance per sample.
STEPS, PRECISION = 30, 1e-7
# The penalty of the fit of logarithms at which Newton's steps start, in samples.
START_PENALTY = 10.0


def standardized(features: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, F + 1] of mean 0 and variance 1 with a column of ones, and the deviations [F] of `features` [n, F]."""
    mean, deviation = features.mean(0), features.std(0, correction=0) + 1e-6
    ones = features.new_ones(len(features), 1)
    return torch.cat([(features - mean) / deviation, ones], 1), deviation


def log_linear(x: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """Weights [F + 1, H] float64 of log-linear fits to each of H targets.

    x: [n, F + 1] float32, with 1 as its last feature.  targets: [n, H] float32, > 0.
    penalty: on the squared weights without the last one, in samples.

    The weights minimize, with m = exp(x . b) and the mean M of the target,
        sum over samples of (m - target x . b) / M  +  penalty |b|^2 / 2
    by Newton's method: O(n F^2) operations per step and target.
    """
    penalties = torch.full((x.shape[1],), penalty, dtype=torch.float64, device=x.device)
    penalties[-1] = 0
    start = torch.linalg.solve(
        (x.mT @ x).double() + torch.diag(penalties / penalty * START_PENALTY), (x.mT @ targets.log()).double()
    )
    return torch.stack([_newton(x, y, b, penalties) for y, b in zip(targets.mT, start.mT, strict=True)], 1)


def _newton(x: Tensor, y: Tensor, weights: Tensor, penalties: Tensor) -> Tensor:
    """The weights [F + 1] of one target [n], from a first guess."""
    mean = y.double().mean()
    y = (y / mean).float()
    weights = weights.clone()
    # An intercept for which the mean is that of the target.
    weights[-1] -= (x @ weights.float()).exp().double().mean().log()

    def loss(b: Tensor) -> Tensor:
        logarithm = x @ b.float()
        return (logarithm.exp().double() - (y * logarithm).double()).sum() + (penalties * b.square()).sum() / 2

    now = loss(weights)
    for _ in range(STEPS):
        expected = (x @ weights.float()).exp()
        slope = (x.mT @ (expected - y)).double() + penalties * weights
        curvature = (x.mT @ (x * expected[:, None])).double() + torch.diag(penalties)
        step = torch.linalg.solve(curvature, slope)
        gain = slope @ step / 2
        share, reached = 1.0, loss(weights - step)
        # The loss is convex, so a part of the step lowers it; float32 ends the search.
        while not reached < now and share > PRECISION:
            share /= 2
            reached = loss(weights - share * step)
        if not reached < now:
            break
        weights, now = weights - share * step, reached
        if gain < PRECISION * len(x):
            break
    weights[-1] += mean.log()
    return weights


def explained_deviance(x: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """R squared [H] of log-linear fits: the share of the deviance from the mean that they explain.

    Cameron and Windmeijer, R-squared measures for count data regression models, 1996.
    1 = all, 0 = as the mean, below 0 = worse; 0 for targets that are all equal.
    weights: their last one does not matter, because the mean of the expectations is made that of the targets.
    """
    y = targets.double() / targets.double().mean(0)
    expected = (x.double() @ weights).exp()
    expected = expected / expected.mean(0)
    total, errors = ((y * (y / m).log()).sum(0) for m in (torch.ones_like(y), expected))
    varies = total > 1e-12 * len(y)
    return torch.where(varies, 1 - errors / total.where(varies, total.new_ones(())), 0.0)
