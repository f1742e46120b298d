"""3x3 convolution with zeros around the image, of an image that may be doubled first."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Arguments


def forward(a: Arguments) -> Tensor:
    """Return (N, K, H, W), or (N, K, 2H, 2W) if doubled, in channels_last."""
    y = F.conv2d(_factor(a, _input(a)), _factor(a, a.weight), a.bias, padding=1)
    return y.contiguous(memory_format=torch.channels_last)


def backward(a: Arguments, grad: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x (channels_last), weight (in its own layout) and bias.

    `grad`: like the output. `wanted`: for each of the three, whether to compute it; otherwise it is an empty tensor.
    """
    x, weight = a.x, a.weight
    products = [wanted[0], wanted[1], wanted[2] and not a.bf16]
    grads = torch.ops.aten.convolution_backward(
        _factor(a, grad), _factor(a, _input(a)), _factor(a, weight), [weight.shape[0]], [1, 1], [1, 1], [1, 1], False,
        [0, 0], 1, products,
    )  # fmt: skip
    grad_x, grad_weight, grad_bias = (x.new_empty(0) if g is None else g for g in grads)
    if wanted[2] and a.bf16:
        grad_bias = grad.sum((0, 2, 3))  # of no product
    if wanted[0]:
        grad_x = (halve(grad_x) if a.doubled else grad_x).contiguous(memory_format=torch.channels_last)
    if wanted[1] and grad_weight.stride() != weight.stride():
        grad_weight = torch.empty_like(weight).copy_(grad_weight)
    return grad_x, grad_weight, grad_bias


def halve(grad: Tensor) -> Tensor:
    """Return the gradient of nearest-neighbour doubling: sums over 2x2 pixels."""
    return F.avg_pool2d(grad, 2, divisor_override=1)


def _factor(a: Arguments, x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype) if a.bf16 else x


def _input(a: Arguments) -> Tensor:
    return F.interpolate(a.x, scale_factor=2.0, mode="nearest") if a.doubled else a.x
