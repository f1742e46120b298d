"""random_normal by the compiled CUDA library."""

import math

import torch
from torch import Tensor

from .. import interface, native_cuda
from ..native_cuda import too_old as unsupported
from ..native_cuda import unavailable
from . import Arguments

__all__ = ["forward", "unavailable", "unsupported"]


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference, within 1e-6 of it: the bits of the compiled CPU library."""
    native_cuda.on_one_device("random_normal", a.images, a.seed, a.step)
    images = a.images.contiguous()
    out = torch.empty(len(images), *a.shape, dtype=torch.float32, device=images.device)
    args = interface.RandomNormal(
        out=native_cuda.pointer(out), n=len(images), num=math.prod(a.shape), stream_id=a.stream,
        key=native_cuda.key(images, a.seed, a.step),
    )  # fmt: skip
    native_cuda.call("random_normal", args, [out])
    return out
