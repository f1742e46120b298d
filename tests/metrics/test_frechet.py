"""The Fréchet distance against the formula with a matrix square root, and sets whose distance is known."""

import numpy as np
import pytest
import torch

from fastddpm.errors import DataError, UsageError
from fastddpm.metrics import Moments, frechet_distance

linalg = pytest.importorskip("scipy.linalg")


def drawn(rng: np.random.Generator, count: int, dimension: int, decades: float = 0.0) -> np.ndarray:
    """Correlated features whose covariance has eigenvalues over `decades` decades or so."""
    scales = np.logspace(0, -decades / 2, dimension)
    rotation, _ = np.linalg.qr(rng.normal(size=(dimension, dimension)))
    return (rng.normal(size=(count, dimension)) * scales) @ rotation + rng.normal(size=dimension)


def by_square_root(a: np.ndarray, b: np.ndarray) -> float:
    covariance_a, covariance_b = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(covariance_a @ covariance_b).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariance_a + covariance_b - 2 * root))


def by_factors(a: np.ndarray, b: np.ndarray) -> float:
    """No covariance at all: |A^½ B^½| in the nuclear norm from QR factors of the features, exact to rounding."""
    r, s = (np.linalg.qr(z - z.mean(0), mode="r") / np.sqrt(len(z) - 1) for z in (a, b))
    cross = np.linalg.svd(r @ s.T, compute_uv=False).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + (r**2).sum() + (s**2).sum() - 2 * cross)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return frechet_distance(*(Moments.of(torch.from_numpy(z)) for z in (a, b)))


@pytest.mark.parametrize(
    ("dimension", "count_a", "count_b", "decades"),
    [(1, 5, 9, 0), (8, 200, 90, 0), (64, 500, 400, 0), (64, 500, 400, 6), (64, 500, 400, 12), (64, 40, 300, 0),
     (64, 40, 30, 4), (64, 2, 2, 0)],
)  # fmt: skip
def test_against_the_formula(
    dimension: int, count_a: int, count_b: int, decades: float, rng: np.random.Generator
) -> None:
    a, b = drawn(rng, count_a, dimension, decades), drawn(rng, count_b, dimension, decades)
    found = distance(a, b)
    if dimension > 1:
        assert found == pytest.approx(by_square_root(a, b), rel=1e-6)
    assert found == pytest.approx(by_factors(a, b), rel=1e-12)


@pytest.mark.parametrize("decades", [0, 12, 30])
def test_two_samples_of_one_distribution(decades: float, rng: np.random.Generator) -> None:
    """A small distance between large traces; 30 decades are too many for Cholesky, and for the formula."""
    both = drawn(rng, 1000, 48, decades)
    a, b = both[:500], both[500:]
    found = distance(a, b)
    assert 0 < found < 0.1 * np.trace(np.cov(a.T))
    assert found == pytest.approx(by_factors(a, b), rel=1e-7)


def test_known_distances(rng: np.random.Generator) -> None:
    a = rng.normal(size=(50, 6))
    assert distance(a, a[::-1].copy()) == pytest.approx(0, abs=1e-12)
    assert distance(a, a + 2) == pytest.approx(6 * 4, rel=1e-12)
    point = np.repeat(a.mean(axis=0, keepdims=True), 20, axis=0)
    assert distance(point, a) == pytest.approx(a.var(axis=0, ddof=1).sum(), rel=1e-12)
    scaled = a.mean(0) + 3 * (a - a.mean(0))  # (A B)^½ is 3 A: 1 + 9 - 6
    assert distance(a, scaled) == pytest.approx(4 * a.var(axis=0, ddof=1).sum(), rel=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_of_batches_are_those_of_the_whole(offset: float, rng: np.random.Generator) -> None:
    """Also for features far from 0, where a sum of squares would have lost every digit of the covariance."""
    x = rng.normal(size=(301, 5)) @ rng.normal(size=(5, 5)) + offset
    batches = torch.from_numpy(x).split(37)
    together = Moments.of_batches(batches)
    halves = Moments.of_batches(batches[:3]).merged(Moments.of_batches(batches[3:]))
    exact = np.cov((x - offset).T)
    for moments in (together, halves, Moments.of_batches(batches[::-1])):
        assert moments.count == 301
        np.testing.assert_allclose(moments.mean.numpy(), x.mean(0), rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(moments.covariance().numpy(), exact, rtol=1e-8 if offset else 1e-12, atol=1e-12)


def test_float32_features_are_summed_in_float64(rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.normal(size=(400, 3)).astype(np.float32)) + 100
    exact = np.cov(x.numpy().astype(np.float64).T)
    np.testing.assert_allclose(Moments.of(x).covariance().numpy(), exact, rtol=1e-12)


def test_mistakes() -> None:
    one = Moments.of(torch.ones(1, 3))
    with pytest.raises(UsageError, match="needs 2 images or more; got 1"):
        frechet_distance(one, one)
    with pytest.raises(UsageError, match="of 3 and of 2 dimensions"):
        frechet_distance(Moments.of(torch.rand(5, 3)), Moments.of(torch.rand(5, 2)))
    for wrong in (torch.zeros(0, 3), torch.zeros(3)):
        with pytest.raises(DataError, match=r"must be \(N, d\)"):
            Moments.of(wrong)
    for value in (float("nan"), float("inf")):
        with pytest.raises(DataError, match="NaN or infinity"):
            Moments.of(torch.tensor([[1.0, value], [0.0, 1.0]]))
