"""conv3x3 and its gradients by Winograd's F(4x4, 3x3) in the compiled CPU library."""

import ctypes

import torch
from torch import Tensor

from .. import interface, native
from ..native import unavailable
from . import (
    WINOGRAD_4X4,
    Arguments,
    Role,
    bf16_algorithm_for,
    reference,
    weight_gradient_wins,
    winograd_wins,
)

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def unsupported(**arguments: object) -> str | None:
    """Return why these arguments are left to PyTorch, or None."""
    for arg in arguments.values():
        if isinstance(arg, Tensor) and arg.dtype != torch.float32:
            return f"the compiled CPU library convolves float32, not {str(arg.dtype).removeprefix('torch.')}"
    return None


def forward(a: Arguments) -> Tensor:
    """Compute the same as the reference; channels_last, within 4e-6 of the largest value.

    With `bf16`, factors are rounded after the transforms of Winograd's algorithm rather than before.
    """
    n, channels, height, width = a.x.shape
    factor = 2 if a.doubled else 1
    if winograd_wins(n, channels, a.weight.shape[0], factor * height, factor * width):
        return winograd(*a)
    return reference.forward(a._replace(bf16=False))


def backward(a: Arguments, grad: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same as the reference."""
    x, weight, _, doubled, bf16 = a
    (out_channels, channels), (height, width) = weight.shape[:2], grad.shape[2:]
    ours = wanted[0] and winograd_wins(len(grad), out_channels, channels, height, width)
    ours_of_weight = wanted[1] and weight_gradient_wins(len(grad), channels, height, width)
    theirs = [wanted[0] and not ours, wanted[1] and not ours_of_weight, wanted[2] and not ours_of_weight]
    grad_x, grad_weight, grad_bias = (
        reference.backward(a._replace(bf16=False), grad, theirs) if any(theirs) else (x.new_empty(0) for _ in range(3))
    )
    if ours:
        grad_x = winograd_input_gradient(grad, weight, doubled, bf16)
    if ours_of_weight:
        grad_weight, grad_bias = winograd_weight_gradient(grad, x, weight, doubled, wanted[2], bf16)
    return grad_x, grad_weight, grad_bias


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None, doubled: bool, bf16: bool = False) -> Tensor:
    """Compute `forward` by Winograd's algorithm, faster or not, for float32 tensors of any size and strides."""
    role: Role | None = "training" if bf16 else None
    return _convolve(role, x, weight, weight.stride(), weight.shape[0], bias, doubled)


def winograd_input_gradient(grad: Tensor, weight: Tensor, doubled: bool, bf16: bool = False) -> Tensor:
    """Return the gradient of x, in channels_last: a convolution of `grad` with the weights turned by 180 degrees."""
    k, c, i, j = weight.stride()
    role: Role | None = "input gradient" if bf16 else None
    grad_x = _convolve(role, grad, weight[:, :, 2:, 2:], (c, k, -i, -j), weight.shape[1], None, False)
    return reference.halve(grad_x).contiguous(memory_format=torch.channels_last) if doubled else grad_x


def winograd_weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, doubled: bool, bias_wanted: bool, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the gradients of weight, in its layout, and of the bias: an empty tensor unless `bias_wanted`."""
    x, grad = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    grad_weight = torch.empty_like(weight)
    grad_bias = weight.new_empty(len(weight) if bias_wanted else 0)
    args = _structure("weight gradient" if bf16 else None, x, grad_weight.stride(), len(weight), doubled)
    args.grad, args.grad_weight = native.pointer(grad), native.pointer(grad_weight)
    args.grad_bias = native.pointer(grad_bias) if bias_wanted else None
    native.call("conv_weight_gradient", args)
    return grad_weight, grad_bias


def _convolve(
    role: Role | None, x: Tensor, weight: Tensor, weight_stride: tuple[int, ...], out_channels: int,
    bias: Tensor | None, doubled: bool,
) -> Tensor:  # fmt: skip
    """Convolve x. `weight` begins at the element for output channel 0, input channel 0, row 0, column 0.

    `role`: in bfloat16, what for; or None, in float32.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    n, _, height, width = x.shape
    factor = 2 if doubled else 1
    out = torch.empty(
        n, out_channels, factor * height, factor * width, dtype=torch.float32, device="cpu",
        memory_format=torch.channels_last,
    )  # fmt: skip
    bias = None if bias is None else bias.contiguous()
    args = _structure(role, x, weight_stride, out_channels, doubled)
    args.weight, args.bias, args.out = native.pointer(weight), native.pointer(bias), native.pointer(out)
    native.call("conv", args)
    return out


def _structure(
    role: Role | None, x: Tensor, weight_stride: tuple[int, ...], out_channels: int, doubled: bool
) -> interface.Conv:
    """Return the structure with what all calls share: x, in channels_last, the sizes, and the algorithm."""
    n, channels, height, width = x.shape
    factor = 2 if doubled else 1
    size = (factor * height, factor * width)
    low = bf16_algorithm_for(role, 3, 1, channels, out_channels, *size, doubled) if role else None
    return interface.Conv(
        x=native.pointer(x), n=n, height=height, width=width, c1=channels, k=out_channels, kernel=3, stride=1, pad=1,
        doubled=doubled, x_stride=(ctypes.c_int64 * 4)(height * width * channels, width * channels, channels, 1),
        weight_stride=(ctypes.c_int64 * 4)(*weight_stride), algorithm=WINOGRAD_4X4 if low is None else low,
        precision=interface.FLOAT32 if low is None else interface.BFLOAT16,
    )  # fmt: skip
