"""convert_image: an image in another dtype, layout and number of channels, for sampling."""

import torch
from torch import Tensor

from fastddpm.kernels.convert_image import Arguments

from .registry import register, register_without_gradient


def convert_image(
    x: Tensor,
    *,
    residual: Tensor | None = None,
    bias: Tensor | None = None,
    channels: int | None = None,
    mirrored: bool = False,
    dtype: torch.dtype | None = None,
    channels_last: bool = True,
) -> Tensor:
    """Return x + residual + bias with `channels` channels: the last are left out, or zeros come behind them.

    `x`, `residual`: floating (N, C, H, W) of one dtype. `bias`: floating (C,). `channels`: default C. `mirrored`: turn
    the image by 180 degrees. The sum is float32 (float64 for float64) and rounded to `dtype`, default x's. Without
    gradients. Raises ValueError for other shapes or dtypes.
    """
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"convert_image: x must be floating (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"convert_image: residual must be {x.dtype} {tuple(x.shape)}; got {residual.dtype} {tuple(residual.shape)}"
        )
    if bias is not None and (bias.shape != x.shape[1:2] or not bias.dtype.is_floating_point):
        raise ValueError(f"convert_image: bias must be floating ({x.shape[1]},); got {bias.dtype} {tuple(bias.shape)}")
    channels = x.shape[1] if channels is None else channels
    if channels < 1:
        raise ValueError(f"convert_image: channels must be 1 or more; got {channels}")
    out: Tensor = torch.ops.fastddpm.convert_image(
        x, residual, bias, channels, mirrored, x.dtype if dtype is None else dtype, channels_last
    )
    return out


def _fake(a: Arguments) -> Tensor:
    n, _, height, width = a.x.shape
    return torch.empty((n, a.channels, height, width), dtype=a.dtype, device=a.x.device, memory_format=a.layout)


register(
    "convert_image",
    Arguments,
    "(Tensor x, Tensor? residual, Tensor? bias, int channels, bool mirrored, ScalarType dtype, bool channels_last) "
    "-> Tensor",
    _fake,
)
register_without_gradient("convert_image")
