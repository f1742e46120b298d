"""The Fréchet distance of two sets of features, from moments that are gathered batch by batch."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastddpm.errors import DataError, UsageError


@dataclass(frozen=True, eq=False)
class Moments:
    """What a Gaussian fit needs to know of features, exact to rounding in float64 however they came.

    `count`: how many. `mean`: float64 (d,). `product`: float64 (d, d), the sum of (x - mean)(x - mean)ᵀ.
    """

    count: int
    mean: Tensor
    product: Tensor

    @staticmethod
    def of(features: Tensor) -> "Moments":
        """The moments of a batch (N, d), computed where it lies. `DataError` for an empty one, NaN and infinity."""
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
        """The moments of all batches together, in their order."""
        return functools.reduce(Moments.merged, map(Moments.of, batches))

    def merged(self, other: "Moments") -> "Moments":
        """The moments of both sets as one (Chan, Golub and LeVeque 1979): no difference of large sums."""
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        between = torch.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, mean, self.product + other.product + between)

    def covariance(self) -> Tensor:
        """The unbiased covariance, float64 (d, d)."""
        if self.count < 2:
            raise UsageError(f"a covariance needs 2 images or more; got {self.count}")
        return self.product / (self.count - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|² + Tr(A + B - 2 (A B)^½) with the unbiased covariances A and B (Dowson and Landau 1982).

    With A = R Rᵀ and B = S Sᵀ, Tr (A B)^½ is the sum of the singular values of Rᵀ S: nothing is added to a diagonal, no
    square root of an unsymmetric matrix is taken, covariances may be singular, and N below d. Features of 2048
    dimensions take seconds. Raises `UsageError` for fewer than 2 images, or sets of different dimensions.
    """
    if a.mean.shape != b.mean.shape:
        raise UsageError(f"features of {len(a.mean)} and of {len(b.mean)} dimensions cannot be compared")
    shift = a.mean - b.mean
    traces = a.covariance().trace() + b.covariance().trace()
    cross = torch.linalg.svdvals(_factor(a).T @ _factor(b)).sum()
    return max(0.0, float(shift @ shift + traces - 2 * cross))


def _factor(moments: Moments) -> Tensor:
    """R of the covariance R Rᵀ, float64 (d, r): Cholesky's where there is one, else from the eigenvectors."""
    covariance = moments.covariance()
    if moments.count > len(covariance):
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if not int(failed):
            return factor
    values, vectors = torch.linalg.eigh(covariance)
    # N points span N - 1 dimensions: the other eigenvalues are nothing but rounding, and are left out for that reason,
    # not for their size. What rounding makes negative of the rest is 0.
    rank = min(len(values), moments.count - 1)
    return vectors[:, -rank:] * values[-rank:].clamp(min=0).sqrt()
