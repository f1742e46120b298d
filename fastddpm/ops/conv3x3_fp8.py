"""conv3x3_fp8: a 3x3 convolution of 8-bit floating-point numbers, for sampling; and the rounding of its operands."""

import torch
from torch import Tensor

from fastddpm.kernels.conv3x3_fp8 import Arguments

from .registry import register, register_without_gradient

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def conv3x3_fp8(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Return scale conv3x3(x, weight) + bias, with stride 1 and one zero on every side, summed in float32.

    `x`: float8_e4m3fn (N, C, H, W), any memory format. `weight`: float8_e4m3fn (K, C, 3, 3) and `scale`: float32 (K,),
    as `quantised` returns them. `bias`: floating (K,). Returns `dtype` (N, K, H, W) in channels_last. Never
    differentiable. Raises ValueError for other shapes or dtypes. The matrix units of sm_89 and sm_90 keep 14 bits of
    sums: an error of 0.1 % to 0.4 % in the 2-norm, by a model of them; rounding to e4m3 costs about 3 %.
    """
    if x.ndim != 4 or x.dtype != E4M3:
        raise ValueError(f"conv3x3_fp8: x must be {E4M3} (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    if weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3) or weight.dtype != E4M3:
        raise ValueError(
            f"conv3x3_fp8: weight must be {E4M3} (K, {x.shape[1]}, 3, 3); got {weight.dtype} {tuple(weight.shape)}"
        )
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None and (value.shape != weight.shape[:1] or not value.dtype.is_floating_point):
            raise ValueError(
                f"conv3x3_fp8: {name} must be floating ({weight.shape[0]},); got {value.dtype} {tuple(value.shape)}"
            )
    return torch.ops.fastddpm.conv3x3_fp8(x, weight, scale, bias, dtype)


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return `weight` (K, ...) as float8_e4m3fn in channels_last, and the float32 scale of each output channel, (K,).

    scale = largest magnitude / 448. weight / scale is rounded to the nearest e4m3 number, by 1/16 of it at most.
    """
    largest = weight.detach().float().abs().flatten(1).amax(1)
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    rounded = (weight.detach().float() / scale.reshape(-1, *[1] * (weight.ndim - 1))).to(E4M3)
    return rounded.contiguous(memory_format=torch.channels_last), scale


def to_e4m3(x: Tensor) -> Tensor:
    """Return `x` clamped to [-448, 448] and rounded to float8_e4m3fn. NaN stays NaN."""
    return x.clamp(-LARGEST, LARGEST).to(E4M3)


def _fake(a: Arguments) -> Tensor:
    n, _, height, width = a.x.shape
    shape = (n, a.weight.shape[0], height, width)
    return torch.empty(shape, dtype=a.dtype, device=a.x.device, memory_format=torch.channels_last)


register(
    "conv3x3_fp8",
    Arguments,
    "(Tensor x, Tensor weight, Tensor scale, Tensor? bias, ScalarType dtype) -> Tensor",
    _fake,
)
register_without_gradient("conv3x3_fp8")
