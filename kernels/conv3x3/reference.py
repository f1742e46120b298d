"""3x3 convolution with zeros around the image, of an image that may be doubled first."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, doubled: bool) -> Tensor:
    """(N, K, H, W), or (N, K, 2H, 2W) when doubled; channels_last."""
    return F.conv2d(_input(x, doubled), weight, bias, padding=1).contiguous(memory_format=torch.channels_last)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, doubled: bool, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (channels_last), weight (in its own layout) and bias; an empty tensor for one not `wanted`."""
    grads = torch.ops.aten.convolution_backward(
        grad, _input(x, doubled), weight, [weight.shape[0]], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
    )
    grad_x, grad_weight, grad_bias = (x.new_empty(0) if g is None else g for g in grads)
    if wanted[0]:
        grad_x = (halve(grad_x) if doubled else grad_x).contiguous(memory_format=torch.channels_last)
    if wanted[1] and grad_weight.stride() != weight.stride():
        grad_weight = torch.empty_like(weight).copy_(grad_weight)
    return grad_x, grad_weight, grad_bias


def halve(grad: Tensor) -> Tensor:
    """The gradient of nearest-neighbour doubling: sums over 2x2 pixels."""
    return F.avg_pool2d(grad, 2, divisor_override=1)


def _input(x: Tensor, doubled: bool) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if doubled else x
