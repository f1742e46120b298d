"""x W^T + b with the factors of the products, here and in the gradients, rounded to bfloat16."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Arguments


def forward(a: Arguments) -> Tensor:
    """Return (..., K), float32."""
    with torch.autocast(a.x.device.type, enabled=False):
        return F.linear(_rounded(a.x), _rounded(a.weight), a.bias)


def backward(a: Arguments, grad: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias.

    `grad`: like the output. `wanted`: for each of the three, whether to compute it; otherwise it is an empty tensor.
    """
    factor = _rounded(grad)
    with torch.autocast(grad.device.type, enabled=False):
        return (
            torch.matmul(factor, _rounded(a.weight)) if wanted[0] else grad.new_empty(0),
            torch.matmul(factor.flatten(0, -2).T, _rounded(a.x).flatten(0, -2)) if wanted[1] else grad.new_empty(0),
            grad.flatten(0, -2).sum(0) if wanted[2] else grad.new_empty(0),
        )


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)
