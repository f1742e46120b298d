"""Which images of a data set are nearest to given ones: are the samples copies? (The paper's appendix.)"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fastddpm.data.dataset import Images
from fastddpm.errors import UsageError
from fastddpm.sampling.trajectories import parts

Features = Callable[[np.ndarray], np.ndarray]
"""Images, uint8 (N, C, H, W), to features, (N, F) floats."""

_BLOCK_BYTES = 64 * 2**20  # of the data set in float64, at once


@dataclass(frozen=True, eq=False)
class Neighbours:
    """For each of Q images the k nearest: `indices`, int64 (Q, k), and `distances`, float64 (Q, k), both ascending.

    A distance is Euclidean: in levels of 255 over all pixels, or in the units of the features. Of equally near images
    the one with the smaller index comes first.
    """

    indices: np.ndarray
    distances: np.ndarray


def nearest_pixels(queries: np.ndarray, images: Images, k: int, *, crop: int | None = None) -> Neighbours:
    """The `k` of `images`, uint8 (N, C, H, W), nearest to each of `queries`, uint8 (Q, C, H, W), in pixel space.

    Exact: squared distances are whole numbers below 2^53, which float64 adds up without rounding. `crop`: only the
    central square of that side counts. 64 MiB of them are held as floats at once. Raises
    `UsageError` for shapes that do not match and for more neighbours than images.
    """
    _check(queries, images, k)
    if crop is not None and not 1 <= crop <= min(images.shape[2:]):
        raise UsageError(f"crop must be in 1..{min(images.shape[2:])}, the images' side; got {crop}")

    def flat(chosen: np.ndarray) -> np.ndarray:
        return _central(chosen, crop).reshape(len(chosen), -1).astype(np.float64)

    wanted = flat(queries)
    rows = max(1, _BLOCK_BYTES // (8 * wanted.shape[1]))
    blocks = (flat(images[part]) for part in parts(len(images), rows))
    indices, squares = _search(wanted, blocks, k)
    return Neighbours(indices, np.sqrt(squares))


def nearest_features(queries: np.ndarray, images: Images, k: int, features: Features, *, batch: int = 64) -> Neighbours:
    """The same in the space of `features`, which sees `batch` images at a time.

    The nearest are chosen by |a|^2 + |b|^2 - 2 a b in float64; the distances of those chosen come from the differences
    themselves, so that a copy is at 0. Raises `UsageError` as `nearest_pixels` does.
    """
    _check(queries, images, k)

    def seen(chosen: np.ndarray) -> np.ndarray:
        return np.concatenate([np.asarray(features(chosen[part]), np.float64) for part in parts(len(chosen), batch)])

    wanted = seen(queries)
    indices, _ = _search(wanted, (seen(images[part]) for part in parts(len(images), batch)), k)
    own = seen(images[indices.reshape(-1)]).reshape(*indices.shape, -1)
    distances = np.sqrt(np.square(own - wanted[:, None]).sum(-1))
    order = np.lexsort((indices, distances))
    return Neighbours(np.take_along_axis(indices, order, 1), np.take_along_axis(distances, order, 1))


def _search(wanted: np.ndarray, blocks: Iterator[np.ndarray], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and squared distances, (Q, k), of the rows of all blocks, one behind the other, nearest to `wanted`."""
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
    if crop is None:
        return images
    top, left = ((side - crop) // 2 for side in images.shape[2:])
    return images[:, :, top : top + crop, left : left + crop]


def _check(queries: np.ndarray, images: Images, k: int) -> None:
    if queries.dtype != np.uint8 or images[:1].dtype != np.uint8 or queries.shape[1:] != images.shape[1:]:
        raise UsageError(
            f"neighbours are sought among uint8 images of one shape; "
            f"got {queries.dtype} {queries.shape} and {images[:1].dtype} {images.shape}"
        )
    if not 1 <= k <= len(images):
        raise UsageError(f"neighbours must be in 1..{len(images)}, the number of images; got {k}")
