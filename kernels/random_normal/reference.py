"""Standard normals as a pure function of (seed, image, step, stream)."""

import math

from torch import Tensor

from ..philox.eager import normals
from . import Arguments


def forward(a: Arguments) -> Tensor:
    """Return float32 normals (N, *shape); element i of an image, in C order, is normal i of its counter."""
    num = math.prod(a.shape)
    return normals(num, a.images, a.seed, a.step, a.stream).reshape(len(a.images), *a.shape)
