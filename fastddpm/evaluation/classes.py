"""A grid of classes, with classifier-free guidance at several scales."""

from collections.abc import Sequence

import numpy as np

from fastddpm.errors import UsageError
from fastddpm.sampler import Sampler

from .drawing import Progress, draw


def class_grid(
    sampler: Sampler,
    seeds: Sequence[int],
    scales: Sequence[float] | None = None,
    *,
    batch: int = 64,
    progress: Progress | None = None,
) -> np.ndarray:
    """Every class from every seed at every scale of guidance: uint8 (scales, classes, seeds, C, H, W).

    A column shares its noise over all classes and scales. `scales`: the sampler's own unless given. Raises `UsageError`
    for a network without classes, and for a scale other than 1 where it was never trained without a class.
    """
    num_classes = classes_of(sampler)
    labels = [label for label in range(num_classes) for _ in seeds]
    grids = []
    for scale in [sampler.guidance] if scales is None else scales:
        guided = sampler if scale == sampler.guidance else sampler.guided(scale)
        drawn = draw(guided, list(seeds) * num_classes, labels, batch=batch, progress=progress)
        grids.append(drawn.reshape(num_classes, len(seeds), *drawn.shape[1:]))
    return np.stack(grids)


def classes_of(sampler: Sampler) -> int:
    """How many classes the network knows; `UsageError` for none."""
    if not sampler.unet.config.num_classes:
        raise UsageError("this network was trained without classes: there is no grid of classes to draw")
    return sampler.unet.config.num_classes
