"""conv3x3_in: a 3x3 convolution of images of few channels, as they come, for sampling."""

import torch
from torch import Tensor

from fastddpm.kernels.conv3x3_in import Arguments

from .registry import register, register_without_gradient


def conv3x3_in(x: Tensor, weight: Tensor, *, mirrored: bool = False) -> Tensor:
    """Return conv3x3(x, weight), with stride 1 and one zero on every side.

    `x`: floating (N, C, H, W), rounded to the weights' dtype first, and turned by 180 degrees if `mirrored`. `weight`:
    floating (K, C, 3, 3). Sums are float32 (float64 for float64). Returns the weights' dtype (N, K, H, W) in
    channels_last. Without gradients. Raises ValueError for other shapes or dtypes.
    """
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"conv3x3_in: x must be floating (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    if weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3) or not weight.dtype.is_floating_point:
        raise ValueError(
            f"conv3x3_in: weight must be floating (K, {x.shape[1]}, 3, 3); got {weight.dtype} {tuple(weight.shape)}"
        )
    return torch.ops.fastddpm.conv3x3_in(x, weight, mirrored)


def _fake(a: Arguments) -> Tensor:
    n, _, height, width = a.x.shape
    shape = (n, len(a.weight), height, width)
    return torch.empty(shape, dtype=a.weight.dtype, device=a.x.device, memory_format=torch.channels_last)


register("conv3x3_in", Arguments, "(Tensor x, Tensor weight, bool mirrored) -> Tensor", _fake)
register_without_gradient("conv3x3_in")
