"""FID statistics in files: distances by SciPy's matrix square root, files as other tools write them, refusals."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from fastddpm.errors import DataError, StorageError, UsageError
from fastddpm.metrics import Moments, frechet_distance
from fastddpm.metrics.statistics import read_statistics, write_statistics

D = 6
NETWORK: Any = SimpleNamespace(name="inception", checksum="ab" * 32, dimension=D)


def features(seed: int, num: int = 200) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(num, D)) @ generator.normal(size=(D, D)) + generator.normal(size=D)


def as_others_write(path: Path, x: np.ndarray) -> Path:
    """What pytorch-fid's --save-stats does."""
    np.savez_compressed(path, mu=np.mean(x, axis=0), sigma=np.cov(x, rowvar=False))
    return path


def by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    """The formula of the FID paper, as pytorch-fid computes it."""
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root))


def silent(line: str) -> None:
    raise AssertionError(line)


def test_a_distance_to_statistics_of_others(tmp_path: Path) -> None:
    x, y = features(0), features(1)
    lines: list[str] = []
    reference = read_statistics(as_others_write(tmp_path / "cifar10.npz", x), NETWORK, lines.append)
    (line,) = lines
    assert "cifar10.npz does not tell which network its statistics are of; " in line and line.endswith("is inception")
    found = frechet_distance(Moments.of(torch.from_numpy(y)), reference.statistics)
    assert found == pytest.approx(by_scipy(x, y), rel=1e-9) and found > 1
    assert frechet_distance(reference.statistics, Moments.of(torch.from_numpy(y))) == pytest.approx(found, rel=1e-9)
    assert (reference.name, reference.statistics.count, len(reference.sha256)) == ("cifar10.npz", None, 64)


@pytest.mark.parametrize("num", [200, 4])
def test_statistics_that_are_written_are_read_by_us_and_others(tmp_path: Path, num: int) -> None:
    """Of fewer images than features, too, whose covariance is singular."""
    x, path = features(2, num), tmp_path / "statistics.npz"
    moments = Moments.of(torch.from_numpy(x))
    write_statistics(moments.statistics(), NETWORK, path)
    with np.load(path) as found:
        np.testing.assert_allclose(found["mu"][:], x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found["sigma"][:], np.cov(x, rowvar=False), rtol=1e-9, atol=1e-12)
        assert found["mu"].dtype == found["sigma"].dtype == np.float64
    reference = read_statistics(path, NETWORK, silent)
    assert reference.statistics.count == num
    y = Moments.of(torch.from_numpy(features(3)))
    assert frechet_distance(y, reference.statistics) == pytest.approx(frechet_distance(y, moments), rel=1e-9)
    assert frechet_distance(moments, reference.statistics) == pytest.approx(0, abs=1e-6)


def test_float32_is_read(tmp_path: Path) -> None:
    x = features(0)
    np.savez(tmp_path / "a.npz", mu=x.mean(0).astype(np.float32), sigma=np.cov(x, rowvar=False).astype(np.float32))
    reference = read_statistics(tmp_path / "a.npz", NETWORK, lambda line: None)
    assert reference.statistics.covariance.dtype == torch.float64
    y = features(1)
    assert frechet_distance(Moments.of(torch.from_numpy(y)), reference.statistics) == pytest.approx(
        by_scipy(x, y), rel=1e-5
    )


GOOD = {"mu": np.zeros(D), "sigma": np.eye(D)}


def with_entry(i: int, j: int, value: float) -> np.ndarray:
    sigma = np.eye(D)
    sigma[i, j] = value
    return sigma


@pytest.mark.parametrize(
    ("arrays", "error", "message"),
    [
        ({"mu": GOOD["mu"]}, DataError, "lacks sigma; FID statistics are an .npz with mu and sigma"),
        ({"arr_0": np.zeros((4, 8, 8, 3), np.uint8)}, DataError, "lacks mu; FID statistics are"),
        (GOOD | {"sigma": np.eye(D - 1)}, DataError, "mu must be floating (d,) and sigma (d, d); got (6,) and (5, 5)"),
        (GOOD | {"mu": np.zeros((D, 1))}, DataError, "got (6, 1) and (6, 6)"),
        (GOOD | {"mu": np.zeros(D, np.int64)}, DataError, "mu must be floating (d,)"),
        ({"mu": np.zeros(4), "sigma": np.eye(4)}, UsageError, "statistics of 4 features, and network inception has 6"),
        (GOOD | {"mu": np.full(D, np.nan)}, DataError, "mu holds NaN or infinity"),
        (GOOD | {"sigma": with_entry(0, 0, np.inf)}, DataError, "sigma holds NaN or infinity"),
        (GOOD | {"sigma": with_entry(0, 1, 0.1)}, DataError, "sigma is not symmetric; entries differ by up to 0.1"),
        (GOOD | {"sigma": with_entry(2, 2, -0.5)}, DataError, "it has the negative eigenvalue -0.5"),
        (GOOD | {"mu": np.full(D, 1e200)}, DataError, "mu holds values of up to 1e+200, which no features have"),
        (GOOD | {"sigma": 1e200 * np.eye(D)}, DataError, "sigma holds values of up to 1e+200"),
        (GOOD | {"count": np.array(D)}, DataError, "sigma has rank 6, which takes 7 images or more, and count is 6"),
        (GOOD | {"count": np.array(1)}, DataError, "count must be one integer, 2 or more; got int64 1"),
        (
            GOOD | {"features": np.array("digits sha256 ff")},
            UsageError,
            "of network digits sha256 ff, not of inception",
        ),
        (GOOD | {"mu": np.array([{}] * D)}, DataError, "mu must be floating (d,)"),
    ],
)
def test_what_is_no_such_file_is_one_message(
    tmp_path: Path, arrays: dict[str, np.ndarray], error: type[Exception], message: str
) -> None:
    path = tmp_path / "statistics.npz"
    np.savez(path, **arrays)
    with pytest.raises(error, match=re.escape(message)):
        read_statistics(path, NETWORK, lambda line: None)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    with pytest.raises(UsageError, match="there is no file of statistics at"):
        read_statistics(path, NETWORK, silent)
    path.write_bytes(b"PK")
    with pytest.raises(DataError, match="cannot be read"):
        read_statistics(path, NETWORK, silent)
    with pytest.raises(StorageError, match="cannot write"):
        write_statistics(Moments.of(torch.rand(9, D)).statistics(), NETWORK, tmp_path / "no" / "such.npz")
