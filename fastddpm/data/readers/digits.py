"""The embedded digits: 5,000 of MNIST (LeCun, Cortes and Burges; CC BY-SA 3.0), 500 of each class."""

from pathlib import Path

import numpy as np
from PIL import Image

from fastddpm.errors import UsageError

_FILE = Path(__file__).parents[1] / "mnist5k.npz"
_SIZE = 28


def load_digits(image_size: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the digits, uint8 (5000, 1, S, S), and their labels, int64 (5000,).

    Their own size is 28x28: S < 28 averages over areas, S > 28 pads with black on all sides. Raises UsageError if
    `channels` is not 1.
    """
    if channels != 1:
        raise UsageError(
            f"the embedded digits are grey: image_channels must be 1, got {channels}; or name other images by --data"
        )
    with np.load(_FILE, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"].astype(np.int64)
    if image_size > _SIZE:
        before = (image_size - _SIZE) // 2
        after = image_size - _SIZE - before
        images = np.pad(images, ((0, 0), (before, after), (before, after)))
    elif image_size < _SIZE:
        size = (image_size, image_size)
        images = np.stack([np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BOX)) for i in images])
    return images[:, None], labels
