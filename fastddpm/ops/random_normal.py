"""random_normal: standard normal images, a pure function of (seed, image, step, stream)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastddpm.kernels.random_normal import Arguments

from .registry import register


def random_normal(shape: Sequence[int], images: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """Draw float32 standard normals (N, *shape) by Philox4x32-10 and Box-Muller.

    `images`: int64 (N,), in 0..2^32-1. `seed` (64-bit key) and `step`: 0-d int64. `stream`: one of
    `fastddpm.kernels.philox.STREAM_*`. Image n depends on images[n], seed, step and stream only. Raises ValueError for
    other shapes or dtypes.
    """
    check_counter("random_normal", images, seed, step)
    return torch.ops.fastddpm.random_normal(list(shape), images, seed, step, stream)


def check_counter(operation: str, images: Tensor, seed: Tensor, step: Tensor) -> None:
    """Raise ValueError unless images is int64 (N,) and seed and step are 0-d int64."""
    if images.ndim != 1 or images.dtype != torch.int64:
        raise ValueError(f"{operation}: images must be int64 (N,); got {images.dtype} {tuple(images.shape)}")
    for name, value in (("seed", seed), ("step", step)):
        if value.ndim != 0 or value.dtype != torch.int64:
            raise ValueError(f"{operation}: {name} must be a 0-d int64 tensor; got {value.dtype} {tuple(value.shape)}")


def _fake(a: Arguments) -> Tensor:
    return a.images.new_empty((a.images.shape[0], *a.shape), dtype=torch.float32)


register(
    "random_normal",
    Arguments,
    "(SymInt[] shape, Tensor images, Tensor seed, Tensor step, int stream) -> Tensor",
    _fake,
)
