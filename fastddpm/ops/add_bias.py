"""add_bias: what follows a convolution without a bias, in one pass: its bias, and the images that are added."""

from typing import Any

import torch
from torch import Tensor

from fastddpm.kernels.add_bias import Arguments
from fastddpm.kernels.add_bias.reference import total

from .channel_sums import bias_gradient
from .derivatives import transformed
from .registry import register, register_gradient


def add_bias(x: Tensor, bias: Tensor, first: Tensor | None = None, second: Tensor | None = None) -> Tensor:
    """Return x + bias + first + second, summed in float32 (float64 for float64): (N, C, H, W) in channels_last.

    `x`: floating (N, C, H, W). `bias`: floating (C,), a number for each channel. `first`, `second`: like x. Under
    torch.autocast images are cast to its dtype, and the bias keeps its own. Raises ValueError for other shapes or
    dtypes.
    """
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"add_bias: x must be floating (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    if bias.shape != x.shape[1:2] or not bias.dtype.is_floating_point:
        raise ValueError(f"add_bias: bias must be floating ({x.shape[1]},); got {bias.dtype} {tuple(bias.shape)}")
    for name, image in (("first", first), ("second", second)):
        if image is None:
            continue
        if image.shape != x.shape or (image.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type)):
            raise ValueError(
                f"add_bias: {name} must be {x.dtype} {tuple(x.shape)}; got {image.dtype} {tuple(image.shape)}"
            )
    if transformed(x, bias, first, second):
        return total(Arguments(x, bias, first, second))
    out: Tensor = torch.ops.fastddpm.add_bias(x, bias, first, second)
    return out


def _fake(a: Arguments) -> Tensor:
    return torch.empty_like(a.x, memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.dtype = inputs[1].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    bias = bias_gradient(grad, ctx.dtype) if wanted[1] else None
    return grad, bias, grad if wanted[2] else None, grad if wanted[3] else None


register(
    "add_bias",
    Arguments,
    "(Tensor x, Tensor bias, Tensor? first, Tensor? second) -> Tensor",
    _fake,
    autocast=("x", "first", "second"),
)
register_gradient("add_bias", _backward, _setup_context)
