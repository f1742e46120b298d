"""inference_norm: group_norm_silu of a sum of two images, which it stores, for sampling."""

import torch
from torch import Tensor

from fastddpm.kernels.inference_norm import Arguments

from .conv3x3_fp8 import E4M3
from .group_norm_silu import check
from .registry import register, register_without_gradient


def inference_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    skip: Tensor | None = None,
    temb: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return silu(scale_shift(group_norm(concat(x + residual, skip) + temb))), and x + residual.

    The arguments are those of `group_norm_silu`, and `residual`: like x. Default: none; the second result is x then.
    `dtype`: of the first result, x's or float8_e4m3fn, to whose range it is clamped. Default: x's. Without gradients.
    Raises ValueError for other shapes or dtypes.
    """
    dtype = x.dtype if dtype is None else dtype
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"inference_norm: residual must be like x, {x.dtype} {tuple(x.shape)}; "
            f"got {residual.dtype} {tuple(residual.shape)}"
        )
    if dtype not in (x.dtype, E4M3):
        raise ValueError(f"inference_norm: dtype must be that of x, {x.dtype}, or {E4M3}; got {dtype}")
    a = Arguments(x, residual, weight, bias, groups, eps, skip, temb, scale, shift, silu, dtype)
    check(a.norm(x))
    y, total = torch.ops.fastddpm.inference_norm(*a)
    return y, x if residual is None else total


def _fake(a: Arguments) -> tuple[Tensor, Tensor]:
    shape = (a.x.shape[0], a.norm(a.x).channels, *a.x.shape[2:])
    y = torch.empty(shape, dtype=a.dtype, device=a.x.device, memory_format=a.memory_format)
    if a.residual is None:
        return y, a.x.new_empty(0)
    return y, torch.empty(a.x.shape, dtype=a.x.dtype, device=a.x.device, memory_format=a.memory_format)


register(
    "inference_norm",
    Arguments,
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, int groups, float eps, Tensor? skip, Tensor? temb,"
    " Tensor? scale, Tensor? shift, bool silu, ScalarType dtype) -> (Tensor, Tensor)",
    _fake,
)
register_without_gradient("inference_norm")
