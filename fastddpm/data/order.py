"""The order of training images: one permutation per epoch, a function of (number of images, seed, epoch)."""

from functools import lru_cache

import numpy as np

from fastddpm.errors import DataError
from fastddpm.kernels.philox import STREAM_ORDER
from fastddpm.kernels.philox.reference import philox


@lru_cache(maxsize=2)
def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of 0..num_images-1, int64, read-only: a stable sort by 64-bit Philox keys.

    NumPy's own generators are not used because their streams may change between versions.
    """
    w0, w1, _, _ = philox(np.zeros(1), np.arange(num_images), np.array([epoch]), np.array([STREAM_ORDER]), seed)
    order = np.argsort((w0.astype(np.uint64) << np.uint64(32)) | w1, kind="stable")
    order.setflags(write=False)
    return order


def check_batch(num_images: int, batch: int) -> None:
    """Raise DataError if there are fewer images than a batch."""
    if num_images < batch:
        raise DataError(
            f"{num_images} images are fewer than a batch of {batch}; use --batch {num_images} or fewer, or more images"
        )


def batch_indices(step: int, num_images: int, batch: int, seed: int) -> np.ndarray:
    """Return the image indices of training step `step`, int64 (batch,).

    An epoch has num_images // batch steps; its remaining images are dropped. Raises DataError if there are fewer
    images than a batch.
    """
    check_batch(num_images, batch)
    epoch, place = divmod(step, num_images // batch)
    return epoch_order(num_images, seed, epoch)[place * batch : (place + 1) * batch]
