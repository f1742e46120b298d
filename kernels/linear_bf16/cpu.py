"""linear_bf16 and its gradients by the compiled CPU library, as a 1x1 convolution of one image of one row."""

import ctypes

import torch
from torch import Tensor

from .. import interface, native
from ..native import unavailable
from . import Arguments

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def unsupported(weight: Tensor, **_: object) -> str | None:
    """Return why these arguments are left to PyTorch, or None."""
    outputs, channels = weight.shape
    if channels % 2 or outputs % 2 or not outputs:
        return f"the compiled CPU library multiplies even numbers of channels in bfloat16, not {channels} by {outputs}"
    return None


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference."""
    return _product(a.x, a.weight, a.weight.stride(), len(a.weight), a.bias)


def backward(a: Arguments, grad: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as the reference; the same bits with any number of threads."""
    x, weight, _ = a
    grad_x, grad_weight, grad_bias = (x.new_empty(0) for _ in range(3))
    if wanted[0]:
        grad_x = _product(grad, weight, weight.stride()[::-1], weight.shape[1], None)
    if wanted[1]:
        grad_weight = torch.empty_like(weight)
        grad_bias = weight.new_empty(len(weight) if wanted[2] else 0)
        x, grad = x.contiguous(), grad.contiguous()
        args = _structure(x, grad_weight.stride(), len(weight))
        args.grad, args.grad_weight = native.pointer(grad), native.pointer(grad_weight)
        args.grad_bias = native.pointer(grad_bias) if wanted[2] else None
        native.call("conv_weight_gradient", args)
    elif wanted[2]:
        grad_bias = grad.flatten(0, -2).sum(0)
    return grad_x, grad_weight, grad_bias


def _product(x: Tensor, weight: Tensor, weight_stride: tuple[int, ...], outputs: int, bias: Tensor | None) -> Tensor:
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], outputs)
    args = _structure(x, weight_stride, outputs)
    args.weight, args.bias, args.out = native.pointer(weight), native.pointer(bias), native.pointer(out)
    native.call("conv", args)
    return out


def _structure(x: Tensor, weight_stride: tuple[int, ...], outputs: int) -> interface.Conv:
    """Return the structure with what all calls share. `weight_stride`: from output to output, from input to input."""
    channels = x.shape[-1]
    pixels = x.numel() // channels
    return interface.Conv(
        x=native.pointer(x), n=1, height=1, width=pixels, c1=channels, k=outputs, kernel=1, stride=1,
        x_stride=(ctypes.c_int64 * 4)(pixels * channels, pixels * channels, channels, 1),
        weight_stride=(ctypes.c_int64 * 4)(*weight_stride), algorithm=interface.PATCHES, precision=interface.BFLOAT16,
    )  # fmt: skip
