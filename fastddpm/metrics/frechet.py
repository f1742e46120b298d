"""The Fréchet distance between two sets of features, from moments that are accumulated batch by batch."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastddpm.errors import DataError, UsageError


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter matrix of features, from which a Gaussian is fitted.

    `count`: number of features. `mean`: float64 (d,). `product`: float64 (d, d), the sum of (x - mean)(x - mean)ᵀ.
    The values are the same up to float64 rounding, however the features are split into batches.
    """

    count: int
    mean: Tensor
    product: Tensor

    @staticmethod
    def of(features: Tensor) -> "Moments":
        """Return the moments of a batch (N, d), on its device. Raises `DataError` if it is empty or not finite."""
        x = features.to(torch.float64)
        if x.ndim != 2 or not len(x):
            raise DataError(f"features must be (N, d) with N >= 1; got {tuple(features.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise DataError("features hold NaN or infinity; the images or the network's weights are damaged")
        mean = x.mean(0)
        centred = x - mean
        return Moments(len(x), mean, centred.T @ centred)

    @staticmethod
    def of_batches(batches: Iterable[Tensor]) -> "Moments":
        """Return the moments of all batches together, merged in their order."""
        return functools.reduce(Moments.merged, map(Moments.of, batches))

    def merged(self, other: "Moments") -> "Moments":
        """Return the moments of the union of both sets (Chan, Golub and LeVeque 1979).

        The formula subtracts no large sums, so it loses no precision.
        """
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, self.product + other.product + between)

    def covariance(self) -> Tensor:
        """Return the unbiased covariance, float64 (d, d). Raises `UsageError` for fewer than 2 images."""
        if self.count < 2:
            raise UsageError(f"a covariance needs 2 images or more; got {self.count}")
        return self.product / (self.count - 1)

    def statistics(self) -> "Statistics":
        """Return mean and unbiased covariance. Raises `UsageError` for fewer than 2 images."""
        return Statistics(self.mean, self.covariance(), self.count)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean, float64 (d,), and unbiased covariance, float64 (d, d), of features: all that a Fréchet distance compares.

    `count`: number of features that they were computed from; None if unknown.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None


def frechet_distance(a: Moments | Statistics, b: Moments | Statistics) -> float:
    """Return |mean_a - mean_b|² + Tr(A + B - 2 (A B)^½), A and B the unbiased covariances (Dowson and Landau 1982).

    With A = R Rᵀ and B = S Sᵀ, Tr (A B)^½ is the sum of the singular values of Rᵀ S. This needs no matrix square root
    and no constant added to the diagonal; covariances may be singular, and N below d. Features of 2048 dimensions take
    seconds. Raises `UsageError` for fewer than 2 images, or features of different dimensions.
    """
    a, b = (each.statistics() if isinstance(each, Moments) else each for each in (a, b))
    if a.mean.shape != b.mean.shape:
        raise UsageError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions cannot be compared")
    shift = a.mean - b.mean
    traces = a.covariance.trace() + b.covariance.trace()
    cross = torch.linalg.svdvals(_factor(a).T @ _factor(b)).sum()
    return max(0.0, float(shift @ shift + traces - 2 * cross))


def _factor(statistics: Statistics) -> Tensor:
    """Return R with covariance R Rᵀ, float64 (d, r): by Cholesky, or by eigenvectors if the covariance is singular."""
    covariance, count = statistics.covariance, statistics.count
    if count is None or count > len(covariance):
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if not int(failed):
            return factor
    values, vectors = torch.linalg.eigh(covariance)
    # N points span N - 1 dimensions, so the other eigenvalues are pure rounding error and are dropped, whatever their
    # size. Kept eigenvalues that rounding has made negative become 0.
    rank = len(values) if count is None else min(len(values), count - 1)
    return vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
