"""random_normal by the compiled CUDA library."""

import math

import torch
from torch import Tensor

from .. import interface, native_cuda
from ..native_cuda import too_old as unsupported
from ..native_cuda import unavailable

__all__ = ["forward", "unavailable", "unsupported"]


def forward(shape: list[int], images: Tensor, seed: Tensor, step: Tensor, stream: int) -> Tensor:
    """As the reference, within 1e-6 of it: the bits of the compiled CPU library."""
    native_cuda.on_one_device("random_normal", images, seed, step)
    images = images.contiguous()
    out = torch.empty(len(images), *shape, dtype=torch.float32, device=images.device)
    args = interface.RandomNormal(
        out=native_cuda.pointer(out),
        n=len(images),
        num=math.prod(shape),
        stream_id=stream,
        key=native_cuda.key(images, seed, step),
    )
    native_cuda.call("random_normal", args, [out])
    return out
