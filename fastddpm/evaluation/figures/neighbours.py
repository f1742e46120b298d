"""Find the nearest images of a data set, to check if samples are copies of training images (the paper's appendix)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fastddpm.data.dataset import Images
from fastddpm.errors import UsageError
from fastddpm.sampling.trajectories import parts

Features = Callable[[np.ndarray], np.ndarray]
"""Returns the features, floats (N, F), of images uint8 (N, C, H, W)."""

_BLOCK_BYTES = 64 * 2**20  # of the data set's pixels, held in float64 at a time


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The k nearest images of each of Q images, nearest first: `indices`, int64 (Q, k), `distances`, float64 (Q, k).

    Distances are Euclidean: over all pixels in levels of 255, or in the units of the features. Of equally near images
    the one with the smaller index comes first.
    """

    indices: np.ndarray
    distances: np.ndarray


def nearest_pixels(queries: np.ndarray, images: Images, k: int, *, crop: int | None = None) -> Neighbours:
    """Return the `k` of `images`, uint8 (N, C, H, W), nearest to each of `queries`, uint8 (Q, C, H, W), by pixels.

    The result is exact, because squared distances are integers below 2^53, which float64 adds without rounding. `crop`:
    side of the central square that is compared, in pixels. Default: the whole image. At most 64 MiB of `images` are
    held in float64 at a time. Raises `UsageError` for shapes that do not match, and unless 1 <= k <= N.
    """
    _check(queries, images, k, crop)

    def flat(chosen: np.ndarray) -> np.ndarray:
        return _central(chosen, crop).reshape(len(chosen), -1).astype(np.float64)

    wanted = flat(queries)
    rows = max(1, _BLOCK_BYTES // (8 * wanted.shape[1]))
    blocks = (flat(images[part]) for part in parts(len(images), rows))
    indices, squares = _search(wanted, blocks, k)
    return Neighbours(indices, np.sqrt(squares))


def nearest_features(queries: np.ndarray, images: Images, k: int, features: Features, *, batch: int = 64) -> Neighbours:
    """Return the `k` of `images` nearest to each of `queries` by `features`, which is given `batch` images at a time.

    The nearest images are chosen by |a|^2 + |b|^2 - 2 a b in float64. Their distances are then computed from the
    differences, so that a copy is at distance 0. Raises `UsageError` as `nearest_pixels` does.
    """
    _check(queries, images, k)

    def features_of(chosen: np.ndarray) -> np.ndarray:
        return np.concatenate([np.asarray(features(chosen[part]), np.float64) for part in parts(len(chosen), batch)])

    wanted = features_of(queries)
    indices, _ = _search(wanted, (features_of(images[part]) for part in parts(len(images), batch)), k)
    own = features_of(images[indices.reshape(-1)]).reshape(*indices.shape, -1)
    distances = np.sqrt(np.square(own - wanted[:, None]).sum(-1))
    order = np.lexsort((indices, distances))
    return Neighbours(np.take_along_axis(indices, order, 1), np.take_along_axis(distances, order, 1))


def _search(wanted: np.ndarray, blocks: Iterator[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices and squared distances, (Q, k), of the rows nearest to `wanted`, numbered through all blocks."""
    indices = np.empty((len(wanted), 0), np.int64)
    squares = np.empty((len(wanted), 0))
    own, seen = np.square(wanted).sum(1, keepdims=True), 0
    for block in blocks:
        new = np.maximum(own + np.square(block).sum(1) - 2 * wanted @ block.T, 0)
        squares = np.concatenate([squares, new], axis=1)
        numbers = np.arange(seen, seen + len(block))
        indices = np.concatenate([indices, np.broadcast_to(numbers, (len(wanted), len(block)))], axis=1)
        order = np.lexsort((indices, squares))[:, :k]
        indices, squares = np.take_along_axis(indices, order, 1), np.take_along_axis(squares, order, 1)
        seen += len(block)
    return indices, squares


def _central(images: np.ndarray, crop: int | None) -> np.ndarray:
    """Return the central square with side `crop`."""
    if crop is None:
        return images
    top, left = ((side - crop) // 2 for side in images.shape[2:])
    return images[:, :, top : top + crop, left : left + crop]


def check_search(images: Images, k: int, crop: int | None = None) -> None:
    """Raise `UsageError` unless 1 <= `k` <= N, and for a `crop` larger than the images."""
    if not 1 <= k <= len(images):
        raise UsageError(f"neighbours must be in 1..{len(images)}, the number of images; got {k}")
    if crop is not None and not 1 <= crop <= min(images.shape[2:]):
        raise UsageError(f"crop must be in 1..{min(images.shape[2:])}, the images' side; got {crop}")


def _check(queries: np.ndarray, images: Images, k: int, crop: int | None = None) -> None:
    if queries.dtype != np.uint8 or images[:1].dtype != np.uint8 or queries.shape[1:] != images.shape[1:]:
        raise UsageError(
            f"nearest neighbours need uint8 images of one shape; "
            f"got {queries.dtype} {queries.shape} and {images[:1].dtype} {images.shape}"
        )
    check_search(images, k, crop)
