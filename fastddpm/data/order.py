"""The order of examples: a permutation for each epoch, a function of (seed, epoch) alone."""

from functools import lru_cache

import numpy as np

from fastddpm.errors import DataError
from fastddpm.kernels.philox import STREAM_ORDER
from fastddpm.kernels.philox.reference import philox


@lru_cache(maxsize=2)
def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..num_images-1, int64, read-only: a stable sort by 64-bit Philox keys.

    Not NumPy's own generators, whose streams may change between versions.
    """
    w0, w1, _, _ = philox(np.zeros(1), np.arange(num_images), np.array([epoch]), np.array([STREAM_ORDER]), seed)
    order = np.argsort((w0.astype(np.uint64) << np.uint64(32)) | w1, kind="stable")
    order.setflags(write=False)
    return order


def batch_indices(step: int, num_images: int, batch: int, seed: int) -> np.ndarray:
    """The examples of training step `step`, int64 (batch,); what is left of an epoch after whole batches is dropped.

    Raises DataError when there are fewer images than a batch.
    """
    if num_images < batch:
        raise DataError(
            f"{num_images} images are fewer than a batch of {batch}; use --batch {num_images} or fewer, or more images"
        )
    epoch, place = divmod(step, num_images // batch)
    return epoch_order(num_images, seed, epoch)[place * batch : (place + 1) * batch]
