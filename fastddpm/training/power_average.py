"""Power-function averages of weights, and one of any length as a combination of others.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3. With w(s) the
weights after step s = 1, 2, .., the average of exponent gamma after step t is

    a(t) = integral_0^t s^gamma w(s) ds / integral_0^t s^gamma ds,

where w keeps its value between two steps. It is updated as a(t) = b(t) a(t-1) + (1 - b(t)) w(t) with
b(t) = (1 - 1/t)^(gamma+1), and b(1) = 0: the initial weights have no share. Its weighting, the profile, has a standard
deviation that grows with t. Divided by t it is the length sigma_rel. Imports no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def exponent_of(sigma_rel: float) -> float:
    """Return the exponent gamma of the average of length `sigma_rel`, in (0, 0.2887].

    It is the largest root of (gamma+1) = sigma_rel^2 (gamma+2)^2 (gamma+3), by the variance of the beta distribution.
    """
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(max(root.real for root in roots if abs(root.imag) < 1e-9 * max(1.0, abs(root))))


def decay_of(exponent: float, step: int) -> float:
    """Return the factor b(t) of the average before step `step` = 1, 2, .. in the average after it."""
    return math.pow(1 - 1 / step, exponent + 1)


@dataclass(frozen=True)
class Combination:
    """A power-function average as a combination of others, with one coefficient for each.

    `error`: the norm of the difference between its profile and the one that was asked for, relative to the norm of
    the latter.
    """

    coefficients: tuple[float, ...]
    error: float


def combine(averages: Sequence[tuple[int, float]], step: int, sigma_rel: float) -> Combination:
    """Return the combination of `averages`, each (step, sigma_rel), nearest to the one of `step` and `sigma_rel`.

    It has the least squared difference of the profiles, among combinations whose coefficients have the sum 1. The
    paper leaves the sum free. With few snapshots it is then some percent from 1, which scales all weights.
    """
    steps = np.array([t for t, _ in averages], dtype=np.float64)
    exponents = np.array([exponent_of(length) for _, length in averages])
    target, exponent = np.float64(step), np.float64(exponent_of(sigma_rel))
    products = _inner_product(steps[:, None], exponents[:, None], steps, exponents)
    with_target = _inner_product(steps, exponents, target, exponent)
    of_target = float(_inner_product(target, exponent, target, exponent))
    # Lagrange's equations, divided by the norms of the profiles, which differ by orders of magnitude.
    norms = np.sqrt(np.diag(products))
    sums = norms.min() / norms
    equations = np.block([[products / norms[:, None] / norms, sums[:, None]], [sums, np.zeros((1, 1))]])
    found = np.linalg.lstsq(equations, np.append(with_target / norms, norms.min()), rcond=None)[0]
    coefficients = found[:-1] / norms
    square = coefficients @ products @ coefficients - 2 * coefficients @ with_target + of_target
    return Combination(tuple(coefficients.tolist()), math.sqrt(max(0.0, float(square)) / of_target))


def _inner_product(t: np.ndarray, gamma: np.ndarray, u: np.ndarray, delta: np.ndarray) -> np.ndarray:
    """Return the integral of the product of two profiles: exponent `gamma` until step t, and `delta` until step u."""
    of_later = np.where(t > u, gamma, delta)
    earlier, later = np.minimum(t, u), np.maximum(t, u)
    product: np.ndarray = (gamma + 1) * (delta + 1) / (gamma + delta + 1) * (earlier / later) ** of_later / later
    return product
