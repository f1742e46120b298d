"""norm_conv: a convolution with the GroupNorm and SiLU before it and the sums after it, for inference."""

import torch
from torch import Tensor

from fastddpm.kernels.norm_conv import Arguments

from .registry import evaluate, register, register_without_gradient


def norm_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, Tensor, int, float] | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = False,
    stride: int = 1,
    pad: int | None = None,
    doubled: bool = False,
    temb: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return conv(silu(scale_shift(group_norm(x)))) + bias + temb + residual: (N, K, H', W') in channels_last.

    `x`: floating (N, C, H, W). `weight`: (K, C, 3, 3) or (K, C, 1, 1), `bias`: (K,). `norm`: weight and bias
    (C,), groups and eps; None: no norm. `scale`, `shift`: (N, C), given together: y (1 + scale) + shift after the norm.
    `stride`: 1 or 2. `pad`: zeros above and to the left, by default 1 for 3x3 and 0 for 1x1; below and to the right
    there are as many as give H' = H / stride, so with stride 2 pad 0 is TensorFlow's SAME. `doubled`: upsample by 2,
    nearest, after the norm. `temb`: (N, K). `residual`: (N, K, H', W'). All of x's dtype. Never differentiable.
    Raises ValueError for other shapes.
    """
    kernel = weight.shape[-1] if weight.ndim == 4 else 0
    if x.ndim != 4 or kernel not in (1, 3) or weight.shape[1:] != (x.shape[1], kernel, kernel):
        raise ValueError(
            f"norm_conv: x must be (N, C, H, W) and weight (K, C, 3, 3) or (K, C, 1, 1); got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if stride not in (1, 2) or (kernel == 1 and stride != 1):
        raise ValueError(f"norm_conv: stride must be 1, or with 3x3 weights 2; got {stride}")
    if stride == 2 and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(f"norm_conv: with stride 2 height and width must be even; got {tuple(x.shape[2:])}")
    n, c = x.shape[:2]
    norm_weight, norm_bias, groups, eps = (None, None, 1, 0.0) if norm is None else norm
    a = Arguments(
        x, weight, bias, norm_weight, norm_bias, groups, eps, scale, shift, silu, stride,
        kernel // 2 if pad is None else pad, doubled, temb, residual,
    )  # fmt: skip
    k = weight.shape[0]
    shapes: tuple[tuple[str, Tensor | None, tuple[int, ...]], ...] = (
        ("bias", bias, (k,)), ("norm_weight", norm_weight, (c,)), ("norm_bias", norm_bias, (c,)),
        ("scale", scale, (n, c)), ("shift", shift, (n, c)), ("temb", temb, (n, k)),
        ("residual", residual, a.out_shape),
    )  # fmt: skip
    for name, tensor, shape in shapes:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"norm_conv: {name} must be {shape}; got {tuple(tensor.shape)}")
    if groups < 1 or c % groups:
        raise ValueError(f"norm_conv: {c} channels do not split into {groups} groups")
    if (scale is None) != (shift is None):
        raise ValueError("norm_conv: scale and shift go together; only one was given")
    out: Tensor = evaluate("norm_conv", *a)
    return out


def _fake(a: Arguments) -> Tensor:
    return torch.empty(a.out_shape, dtype=a.x.dtype, device=a.x.device, memory_format=torch.channels_last)


register(
    "norm_conv",
    Arguments,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, int groups, float eps,"
    " Tensor? scale, Tensor? shift, bool silu, int stride, int pad, bool doubled, Tensor? temb, Tensor? residual)"
    " -> Tensor",
    _fake,
)
register_without_gradient("norm_conv")
