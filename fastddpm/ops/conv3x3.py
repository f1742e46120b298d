"""conv3x3: 3x3 convolution with stride 1, optionally of an image upsampled by 2."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.kernels.conv3x3 import Arguments

from .derivatives import differentiable_backward, transformed
from .registry import evaluate, register, register_gradient


def conv3x3(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, doubled: bool = False, bf16: bool = False
) -> Tensor:
    """Convolve x with 3x3 weights, stride 1 and one zero on every side. `doubled`: upsample x by 2 (nearest) first.

    `bf16`: round the factors of the products to bfloat16, here and in the gradients; sums and tensors keep x's dtype.
    The compiled CPU library, which rounds what Winograd's algorithm multiplies, leaves fewer than 16 channels exact.

    `x`: floating (N, C, H, W), any memory format. `weight`: (K, C, 3, 3), `bias`: (K,), in x's dtype.
    Under torch.autocast all of them are cast to its dtype, as by F.conv2d.
    Returns (N, K, H, W), or (N, K, 2H, 2W), in channels_last.
    Raises ValueError for other shapes or dtypes.
    """
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"conv3x3: x must be floating (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    casts = torch.is_autocast_enabled(x.device.type)
    if weight.ndim != 4 or weight.shape[1:] != (x.shape[1], 3, 3) or (weight.dtype != x.dtype and not casts):
        raise ValueError(
            f"conv3x3: weight must be {x.dtype} (K, {x.shape[1]}, 3, 3); got {weight.dtype} {tuple(weight.shape)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or (bias.dtype != x.dtype and not casts)):
        raise ValueError(f"conv3x3: bias must be {x.dtype} ({weight.shape[0]},); got {bias.dtype} {tuple(bias.shape)}")
    if transformed(x, weight, bias):
        return plain(x, weight, bias, doubled, bf16)
    return evaluate("conv3x3", x, weight, bias, doubled, bf16)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, doubled: bool, bf16: bool) -> Tensor:
    """Return the result in PyTorch's operators: for export, and for derivatives that the kernels do not have."""
    if bf16:
        x, weight = (factor.bfloat16().to(factor.dtype) for factor in (x, weight))
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest") if doubled else x, weight, bias, padding=1)


def _fake(a: Arguments) -> Tensor:
    n, _, height, width = a.x.shape
    factor = 2 if a.doubled else 1
    shape = (n, a.weight.shape[0], factor * height, factor * width)
    return torch.empty(shape, dtype=a.x.dtype, device=a.x.device, memory_format=torch.channels_last)


def _fake_backward(a: Arguments, grad: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(a.x, memory_format=torch.channels_last) if wanted[0] else a.x.new_empty(0),
        torch.empty_like(a.weight) if wanted[1] else a.x.new_empty(0),
        a.weight.new_empty(a.weight.shape[0]) if wanted[2] else a.x.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.doubled, ctx.bf16 = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted, (x, weight, bias) = list(ctx.needs_input_grad[:3]), ctx.saved_tensors
    if torch.is_grad_enabled():
        convolve = functools.partial(plain, doubled=ctx.doubled, bf16=ctx.bf16)
        return *differentiable_backward(convolve, (x, weight, bias), grad, wanted), None, None
    grads = evaluate("conv3x3_backward", grad, x, weight, ctx.doubled, ctx.bf16, wanted)
    return *(gradient if want else None for gradient, want in zip(grads, wanted, strict=True)), None, None


register(
    "conv3x3",
    Arguments,
    "(Tensor x, Tensor weight, Tensor? bias, bool doubled, bool bf16) -> Tensor",
    _fake,
    autocast=("x", "weight", "bias"),
)
register(
    "conv3x3_backward",
    Arguments,
    "(Tensor grad, Tensor x, Tensor weight, bool doubled, bool bf16, bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    operation="conv3x3",
)
register_gradient("conv3x3", _backward, _setup_context)
