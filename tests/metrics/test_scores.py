"""Inception Score, kernel distance, precision and recall against NumPy in float64, written out pair by pair."""

import importlib

import numpy as np
import pytest
import torch

from fastddpm.data import epoch_order
from fastddpm.errors import DataError, UsageError
from fastddpm.metrics import inception_score, kernel_distance, kernel_distance_of_subsets, kid, precision_recall


def tensors(*arrays: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in arrays]


# Inception Score


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_inception_score_by_its_definition(splits: int, rng: np.random.Generator) -> None:
    logits = rng.normal(size=(47, 6)) * 3
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    scores = []
    for i in range(splits):
        part = p[i * 47 // splits : (i + 1) * 47 // splits]
        divergences = [sum(q * np.log(q / part[:, k].mean()) for k, q in enumerate(row)) for row in part]
        scores.append(np.exp(np.mean(divergences)))
    found = inception_score(torch.from_numpy(logits), splits)
    assert found == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_known_inception_scores() -> None:
    sure = 1000 * torch.eye(10).repeat(5, 1)  # p(y|x) is 0 and 1, each class as often: the score is the classes
    assert inception_score(sure, 5) == pytest.approx((10, 0), abs=1e-9)
    assert inception_score(torch.randn(20, 1).expand(20, 10), 2) == pytest.approx((1, 0), abs=1e-12)


def test_inception_score_mistakes() -> None:
    with pytest.raises(UsageError, match="10 parts needs as many images or more; got 9"):
        inception_score(torch.zeros(9, 3))
    with pytest.raises(DataError, match="NaN"):
        inception_score(torch.full((10, 3), float("nan")))


# Kernel distance


def mmd(x: np.ndarray, y: np.ndarray) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / len(a) + 1) ** 3)

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


@pytest.mark.parametrize("block", [4, 7, 2048])
def test_kernel_distance_pair_by_pair(block: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kid, "_BLOCK", block)
    x, y = rng.normal(size=(23, 5)), rng.normal(size=(16, 5)) + 0.3
    told = []
    found = kernel_distance(*tensors(x, y), lambda done, total: told.append((done, total)))
    assert found == pytest.approx(mmd(x, y), rel=1e-11)
    assert [done for done, _ in told] == list(range(1, told[-1][1] + 1))


def test_kernel_distance_is_unbiased(rng: np.random.Generator) -> None:
    """Of two samples of one distribution it is 0 on average, and therefore as often below as above."""
    found = [kernel_distance(*tensors(*rng.normal(size=(2, 20, 4)))) for _ in range(200)]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(200)
    assert 0.2 < np.mean(np.array(found) < 0) < 0.8


def test_subsets_are_drawn_without_replacement_by_philox(rng: np.random.Generator) -> None:
    x, y = rng.normal(size=(30, 4)), rng.normal(size=(25, 4)) + 1
    expected = [mmd(x[epoch_order(30, 7, 2 * i)[:9]], y[epoch_order(25, 7, 2 * i + 1)[:9]]) for i in range(5)]
    found = kernel_distance_of_subsets(*tensors(x, y), subsets=5, size=9, seed=7)
    assert found == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-11)
    assert len(set(np.round(expected, 12))) == 5
    assert kernel_distance_of_subsets(*tensors(x, y), subsets=5, size=9, seed=8) != found


def test_kernel_distance_mistakes() -> None:
    x = torch.rand(5, 3)
    with pytest.raises(UsageError, match="2 to 5 images; got 1 of 6"):
        kernel_distance_of_subsets(x, x, subsets=1, size=6)
    with pytest.raises(UsageError, match=r"got \(5, 3\) and \(5, 2\)"):
        kernel_distance(x, x[:, :2])
    with pytest.raises(UsageError, match="2 images or more of each set; got 5 and 1"):
        kernel_distance(x, x[:1])


# Precision and recall


def covered(points: np.ndarray, centres: np.ndarray, k: int) -> float:
    """The share of `points` within the distance of some centre to its k-th nearest other centre."""
    radii = [
        sorted(np.linalg.norm(c - o) for j, o in enumerate(centres) if j != i)[k - 1] for i, c in enumerate(centres)
    ]
    inside = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
    return sum(inside) / len(points)


@pytest.mark.parametrize("block_bytes", [8 * 25, 8 * 25 * 7, 2**26])
def test_precision_recall_by_counting(
    block_bytes: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("fastddpm.metrics.precision_recall")  # the package's name is the function
    monkeypatch.setattr(module, "_BLOCK_BYTES", block_bytes)
    real, fake = rng.normal(size=(40, 3)) + 50, rng.normal(size=(25, 3)) + 51
    told = []
    precision, recall = precision_recall(*tensors(real, fake), 3, lambda done, total: told.append((done, total)))
    assert (precision, recall) == (covered(fake, real, 3), covered(real, fake, 3))
    assert 0 < recall < precision < 1
    assert told[-1] == (2 * 40 + 25, 2 * 40 + 25)


def test_copies_are_at_distance_zero(rng: np.random.Generator) -> None:
    """The manifold of points that are there four times has radius 0: their copies are in it, nothing else is."""
    points = np.float32(rng.normal(size=(30, 200)) * 1e3 + 1e4)
    real = np.repeat(points, 4, axis=0)
    shuffled = real[rng.permutation(len(real))]
    assert precision_recall(*tensors(real, shuffled)) == (1, 1)
    assert precision_recall(*tensors(real, shuffled * np.float32(1 + 1e-5))) == (0, 0)


def test_precision_recall_mistakes() -> None:
    with pytest.raises(UsageError, match="3 neighbours need more images of each set, at least 4; got 9 and 3"):
        precision_recall(torch.rand(9, 2), torch.rand(3, 2))
    with pytest.raises(UsageError, match=r"must be \(N, d\)"):
        precision_recall(torch.rand(9, 2), torch.rand(9, 3))
