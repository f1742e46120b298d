"""add_product: an image plus a matrix product of the channels of one or two images, for sampling."""

import torch
from torch import Tensor

from fastddpm.kernels.add_product import Arguments

from .registry import register, register_without_gradient


def add_product(
    image: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, skip: Tensor | None = None
) -> Tensor:
    """Return image + weight concat(x, skip) + bias at every pixel, summed in float32 (float64 for float64).

    `image`: floating (N, K, H, W). `x`, `skip`: (N, C1, H, W) and (N, C2, H, W). `weight`: (K, C1 + C2). All have one
    dtype. `bias`: floating (K,). Returns (N, K, H, W) in channels_last. Without gradients. Raises ValueError for other
    shapes or dtypes.
    """
    if image.ndim != 4 or not image.dtype.is_floating_point:
        raise ValueError(f"add_product: image must be floating (N, K, H, W); got {image.dtype} {tuple(image.shape)}")
    n, outputs, height, width = image.shape
    channels = 0
    for name, value in (("x", x), ("skip", skip)):
        if value is None:
            continue
        if value.ndim != 4 or (n, height, width) != (*value.shape[:1], *value.shape[2:]) or value.dtype != image.dtype:
            raise ValueError(
                f"add_product: {name} must be {image.dtype} ({n}, C, {height}, {width}); "
                f"got {value.dtype} {tuple(value.shape)}"
            )
        channels += value.shape[1]
    if weight.shape != (outputs, channels) or weight.dtype != image.dtype:
        raise ValueError(
            f"add_product: weight must be {image.dtype} ({outputs}, {channels}); "
            f"got {weight.dtype} {tuple(weight.shape)}"
        )
    if bias is not None and (bias.shape != (outputs,) or not bias.dtype.is_floating_point):
        raise ValueError(f"add_product: bias must be floating ({outputs},); got {bias.dtype} {tuple(bias.shape)}")
    out: Tensor = torch.ops.fastddpm.add_product(image, x, skip, weight, bias)
    return out


def _fake(a: Arguments) -> Tensor:
    return torch.empty_like(a.image, memory_format=torch.channels_last)


register(
    "add_product",
    Arguments,
    "(Tensor image, Tensor x, Tensor? skip, Tensor weight, Tensor? bias) -> Tensor",
    _fake,
)
register_without_gradient("add_product")
