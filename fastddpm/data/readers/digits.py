"""The embedded digits: 5,000 of MNIST (LeCun, Cortes and Burges; CC BY-SA 3.0), 500 of each class."""

from pathlib import Path

import numpy as np
from PIL import Image

from fastddpm.errors import UsageError
from fastddpm.runtime.image_size import ImageSize, sides

_FILE = Path(__file__).parents[1] / "mnist5k.npz"
_SIZE = 28


def load_digits(image_size: ImageSize, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the digits, uint8 (5000, 1, H, W), and their labels, int64 (5000,).

    Their own size is 28x28: a height or width below 28 averages over areas, one above pads with black on both sides.
    Raises UsageError if `channels` is not 1.
    """
    if channels != 1:
        raise UsageError(
            f"the embedded digits are grey: image_channels must be 1, got {channels}; or name other images by --data"
        )
    with np.load(_FILE, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"].astype(np.int64)
    height, width = sides(image_size)
    if min(height, width) < _SIZE:
        size = (min(width, _SIZE), min(height, _SIZE))
        images = np.stack([np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BOX)) for i in images])
    if max(height, width) > _SIZE:
        margins = [max(0, side - _SIZE) for side in (height, width)]
        images = np.pad(images, ((0, 0), *((margin // 2, margin - margin // 2) for margin in margins)))
    return images[:, None], labels
