"""channel_sums: sums of channels, which are the gradient of a bias, and a linear layer whose bias takes it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastddpm.kernels.channel_sums import Arguments

from .derivatives import transformed
from .registry import computed_dtype, register, register_without_gradient


def channel_sums(x: Tensor) -> Tensor:
    """Return the sums of each channel of x, floating (N, C, H, W), over images and pixels: (C,).

    In float32 (float64 for float64), without gradients. Raises ValueError for another shape or dtype.
    """
    if x.ndim != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"channel_sums: x must be floating (N, C, H, W); got {x.dtype} {tuple(x.shape)}")
    sums: Tensor = torch.ops.fastddpm.channel_sums(x)
    return sums


def bias_gradient(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient, (C,), of a bias of `dtype` that was added to every pixel; `grad`: of the sum, (N, C, H, W).

    It can be differentiated again if gradients are enabled.
    """
    if torch.is_grad_enabled():
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        return grad.sum((0, 2, 3), dtype=wide).to(dtype)
    return channel_sums(grad).to(dtype)


class _BiasGradient(torch.autograd.Function):
    """Gives what a linear layer returned, and its bias, which the layer took as a constant, the gradient."""

    @staticmethod
    def forward(out: Tensor, bias: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        pixels = grad.reshape(-1, grad.shape[-1])[..., None, None]
        return grad, bias_gradient(pixels, ctx.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return F.linear(x, weight, bias), whose bias gets its gradient by `channel_sums`, in the bias's own dtype."""
    if transformed(x, weight, bias):
        return F.linear(x, weight, bias)
    out: Tensor = _BiasGradient.apply(F.linear(x, weight, bias.detach().to(weight.dtype)), bias)
    return out


class _Linears(torch.autograd.Function):
    """Linear layers of one input, whose gradient is summed by the products that make its parts."""

    @staticmethod
    def forward(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        count = len(parameters) // 2
        pairs = zip(parameters[:count], parameters[count:], strict=True)
        return tuple(F.linear(x, weight, bias.to(weight.dtype)) for weight, bias in pairs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, *parameters = inputs
        weights, biases = parameters[: len(output)], parameters[len(output) :]
        ctx.save_for_backward(x, *weights)
        ctx.dtypes = [bias.dtype for bias in biases]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, *weights = ctx.saved_tensors
        rows = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        total, flat = rows[0] @ weights[0], x.reshape(-1, x.shape[-1])
        for row, weight in zip(rows[1:], weights[1:], strict=True):
            # In place, because otherwise `total` is copied first.
            total = torch.addmm(total, row, weight) if torch.is_grad_enabled() else total.addmm_(row, weight)
        biases = [bias_gradient(row[..., None, None], dtype) for row, dtype in zip(rows, ctx.dtypes, strict=True)]
        return total.reshape(x.shape), *(row.t() @ flat for row in rows), *biases


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return `linear` of x with each weight and bias."""
    if transformed(x, *weights, *biases) or x.dtype != computed_dtype(x):
        return [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    outs: tuple[Tensor, ...] = _Linears.apply(x, *(weight.to(x.dtype) for weight in weights), *biases)
    return outs


def _fake(a: Arguments) -> Tensor:
    dtype = torch.float64 if a.x.dtype == torch.float64 else torch.float32
    return a.x.new_empty(a.x.shape[1], dtype=dtype)


register("channel_sums", Arguments, "(Tensor x) -> Tensor", _fake)
register_without_gradient("channel_sums")
