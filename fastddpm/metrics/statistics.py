"""FID statistics as .npz files: mean and covariance of features, as pytorch-fid, clean-fid and ADM exchange them.

mu          float (d,), the mean of the features
sigma       float (d, d), their unbiased covariance
count       int64, the number of images                      optional: other tools write only the two above
features    str, the name and sha256 of the feature network  optional
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastddpm.errors import DataError, UsageError
from fastddpm.storage.files import save_arrays
from fastddpm.storage.reading import open_regular, read_arrays, read_headers

from .features import FeatureNetwork
from .frechet import Statistics

_ROUNDING = 1e-6  # of the largest entry or eigenvalue: what float32 and another order of summation may leave
_LARGEST = 1e100  # its square is finite
_TEXT = 512  # bytes of the small arrays


def write_statistics(statistics: Statistics, network: FeatureNetwork, path: Path) -> None:
    """Write statistics of features of `network`, atomically. Raises `StorageError` if the file cannot be written."""
    arrays = {"mu": statistics.mean.cpu().numpy(), "sigma": statistics.covariance.cpu().numpy()}
    if statistics.count is not None:
        arrays["count"] = np.array(statistics.count, dtype=np.int64)
    save_arrays(arrays | {"features": np.array(_signature(network))}, path, compress=False)


@dataclass(frozen=True, eq=False)
class Reference:
    """Statistics of a file, its name, and its sha256."""

    statistics: Statistics
    name: str
    sha256: str


def read_statistics(path: Path, network: FeatureNetwork, report: Callable[[str], None]) -> Reference:
    """Read statistics to compare features of `network` with.

    `report` gets a line if the file does not tell which network they are of. Raises `UsageError` if there is no file,
    or its statistics are of another network or dimension, and `DataError` if it is damaged, or mu and sigma are not
    finite numbers of one dimension, sigma symmetric and positive semidefinite.
    """
    size = network.dimension
    try:
        headers = read_headers(path, ["mu", "sigma", "count", "features"])
        missing = [name for name in ("mu", "sigma") if name not in headers]
        if missing:
            raise DataError(f"{path} lacks {missing[0]}; FID statistics are an .npz with mu and sigma")
        found = [headers[name][0] for name in ("mu", "sigma")]
        if (
            any(headers[name][1].kind != "f" for name in ("mu", "sigma"))
            or len(found[0]) != 1
            or found[1] != found[0] * 2
        ):
            raise DataError(f"{path}: mu must be floating (d,) and sigma (d, d); got {found[0]} and {found[1]}")
        if found[0] != (size,):
            raise UsageError(
                f"{path} holds statistics of {found[0][0]} features, and network {network.name} has {size}; choose the "
                "network that they are of with --features"
            )
        arrays = read_arrays(path, list(headers), 16 * size * (size + 1) + _TEXT)
    except FileNotFoundError:
        raise UsageError(f"there is no file of statistics at {path}") from None
    _check_network(arrays.get("features"), network, path, report)
    mean, covariance = (torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma"))
    count = _count(arrays.get("count"), path)
    _check_gaussian(mean, covariance, count, path)
    statistics = Statistics(mean, (covariance + covariance.T) / 2, count)
    with open_regular(path) as file:
        sha256 = hashlib.sha256(file.read()).hexdigest()
    return Reference(statistics, path.name, sha256)


def _signature(network: FeatureNetwork) -> str:
    return f"{network.name} sha256 {network.checksum}"


def _check_network(text: np.ndarray | None, network: FeatureNetwork, path: Path, report: Callable[[str], None]) -> None:
    if text is None:
        report(
            f"note: {path} does not tell which network its statistics are of; the distance means something only if it "
            f"is {network.name}"
        )
    elif str(text) != _signature(network):
        raise UsageError(f"{path} holds statistics of network {text!s:.100}, not of {_signature(network)}")


def _check_gaussian(mean: torch.Tensor, covariance: torch.Tensor, count: int | None, path: Path) -> None:
    """Raise `DataError` unless these are the mean and the covariance of `count` points, None: of any number."""
    for name, values in (("mu", mean), ("sigma", covariance)):
        if not bool(torch.isfinite(values).all()):
            raise DataError(f"{path}: {name} holds NaN or infinity")
        if float(values.abs().max()) > _LARGEST:
            raise DataError(
                f"{path}: {name} holds values of up to {float(values.abs().max()):g}, which no features have"
            )
    largest = float(covariance.abs().max())
    asymmetry = float((covariance - covariance.T).abs().max())
    if asymmetry > _ROUNDING * largest:
        raise DataError(f"{path}: sigma is not symmetric; entries differ by up to {asymmetry:g}")
    values = torch.linalg.eigvalsh(covariance)
    if float(values[0]) < -_ROUNDING * float(values[-1].abs()):
        raise DataError(f"{path}: sigma is no covariance; it has the negative eigenvalue {float(values[0]):g}")
    rank = int((values > _ROUNDING * values[-1]).sum())
    if count is not None and rank >= count:
        raise DataError(f"{path}: sigma has rank {rank}, which takes {rank + 1} images or more, and count is {count}")


def _count(value: np.ndarray | None, path: Path) -> int | None:
    if value is None:
        return None
    if value.shape or value.dtype.kind not in "iu" or int(value) < 2:
        raise DataError(f"{path}: count must be one integer, 2 or more; got {value.dtype} {value!s:.100}")
    return int(value)
