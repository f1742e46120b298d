"""Which images of the data set a picture shows: picked by a permutation that is the same every time."""

import numpy as np

from fastddpm.data import Dataset
from fastddpm.data.order import epoch_order
from fastddpm.errors import UsageError
from fastddpm.sampler import Sampler

_SEED = 0


def picked(dataset: Dataset, count: int) -> np.ndarray:
    """Indices of `count` images, int64 (count,); `UsageError` where there are fewer."""
    num = len(dataset.images)
    if num < count:
        raise UsageError(f"the picture takes {count} images, the data set has {num}; show fewer rows")
    return epoch_order(num, _SEED, 0)[:count]


def pairs(dataset: Dataset, count: int, sampler: Sampler) -> tuple[np.ndarray, list[int] | None]:
    """Indices of images to interpolate between, int64 (count, 2), and the label of each pair where labels are wanted.

    For a network with classes both images of a pair are of one class, for it draws what lies between them; where the
    data set has no labels the network's null label stands for any class. Raises `UsageError` where that cannot be.
    """
    num_classes, null_label = sampler.unet.config.num_classes, sampler.unet.null_label
    if num_classes and dataset.labels is not None:
        return _of_one_class(dataset.labels, count)
    if num_classes and null_label is None:
        raise UsageError("this network wants a class for every image, and the data set has none to interpolate within")
    found = picked(dataset, 2 * count).reshape(count, 2)
    return found, [null_label] * count if num_classes and null_label is not None else None


def _of_one_class(labels: np.ndarray, count: int) -> tuple[np.ndarray, list[int]]:
    waiting: dict[int, int] = {}
    found: list[tuple[int, int]] = []
    for index in epoch_order(len(labels), _SEED, 0).tolist():
        label = int(labels[index])
        if label not in waiting:
            waiting[label] = index
            continue
        found.append((waiting.pop(label), index))
        if len(found) == count:
            return np.array(found), [int(labels[first]) for first, _ in found]
    raise UsageError(f"{count} pairs of images of one class are wanted, the data set has {len(found)}; show fewer rows")
