"""Standard normals as a pure function of (seed, image, step, stream)."""

from torch import Tensor

from ..philox.eager import normals


def forward(shape: list[int], images: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """Float32 normals of shape (N, *shape); element i of an image, in C order, is normal i of its counter."""
    num = 1
    for size in shape:
        num *= size
    return normals(num, images, seed, step, stream).reshape(len(images), *shape)
