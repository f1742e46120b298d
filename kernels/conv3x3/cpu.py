"""conv3x3 by Winograd's F(4x4, 3x3) in the compiled library; the weights' gradient is PyTorch's."""

import ctypes

import torch
from torch import Tensor

from .. import interface, native
from ..native import unavailable
from . import WINOGRAD, reference, winograd_wins

__all__ = ["backward", "forward", "unavailable", "unsupported"]


def unsupported(**arguments: object) -> str | None:
    """Why these arguments are left to PyTorch, or None."""
    for arg in arguments.values():
        if isinstance(arg, Tensor) and arg.dtype != torch.float32:
            return f"the compiled CPU library convolves float32, not {str(arg.dtype).removeprefix('torch.')}"
    return None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, doubled: bool) -> Tensor:
    """As the reference; channels_last, within 4e-6 of the largest value."""
    n, channels, height, width = x.shape
    factor = 2 if doubled else 1
    if winograd_wins(n, channels, weight.shape[0], factor * height, factor * width):
        return winograd(x, weight, bias, doubled)
    return reference.forward(x, weight, bias, doubled)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, doubled: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    out_channels, channels, _, _ = weight.shape
    if not (wanted[0] and winograd_wins(len(grad), out_channels, channels, grad.shape[2], grad.shape[3])):
        return reference.backward(grad, x, weight, doubled, wanted)
    _, grad_weight, grad_bias = reference.backward(grad, x, weight, doubled, [False, *wanted[1:]])
    return winograd_input_gradient(grad, weight, doubled), grad_weight, grad_bias


def winograd(x: Tensor, weight: Tensor, bias: Tensor | None, doubled: bool) -> Tensor:
    """`forward` of float32 tensors of any size and strides by Winograd's algorithm, whether it wins or not."""
    return _convolve(x, weight, weight.stride(), weight.shape[0], bias, doubled)


def winograd_input_gradient(grad: Tensor, weight: Tensor, doubled: bool) -> Tensor:
    """The gradient of x, channels_last: a convolution of `grad` with the weights turned by 180 degrees."""
    k, c, i, j = weight.stride()
    grad_x = _convolve(grad, weight[:, :, 2:, 2:], (c, k, -i, -j), weight.shape[1], None, False)
    return reference.halve(grad_x).contiguous(memory_format=torch.channels_last) if doubled else grad_x


def _convolve(
    x: Tensor, weight: Tensor, weight_stride: tuple[int, ...], out_channels: int, bias: Tensor | None, doubled: bool
) -> Tensor:
    """`weight`: a tensor that begins at the element for output channel 0, input channel 0, row 0, column 0."""
    x = x.contiguous(memory_format=torch.channels_last)
    n, channels, height, width = x.shape
    factor = 2 if doubled else 1
    out = torch.empty(
        n, out_channels, factor * height, factor * width, dtype=torch.float32, memory_format=torch.channels_last
    )
    bias = None if bias is None else bias.contiguous()
    args = interface.Conv(
        x=native.pointer(x), weight=native.pointer(weight), bias=native.pointer(bias), out=native.pointer(out),
        n=n, height=height, width=width, c1=channels, k=out_channels, kernel=3, stride=1, pad=1, doubled=doubled,
        x_stride=(ctypes.c_int64 * 4)(height * width * channels, width * channels, channels, 1),
        weight_stride=(ctypes.c_int64 * 4)(*weight_stride), algorithm=WINOGRAD,
    )  # fmt: skip
    threads = torch.get_num_threads()
    args.workspace_bytes = native.library().fastddpm_cpu_conv_workspace(ctypes.byref(args), threads)
    workspace = torch.empty(args.workspace_bytes, dtype=torch.uint8)
    args.workspace = workspace.data_ptr()
    native.call("conv", args)
    return out
