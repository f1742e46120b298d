"""q(x_t | x_0), equation 4 of the paper: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps."""

import math

import torch
from torch import Tensor

from ..philox import STREAM_FORWARD
from ..philox.eager import normals
from . import Arguments


def scale_images(images: Tensor, flip: Tensor | None) -> Tensor:
    """Return images as float32 in [-1, 1], those with a true `flip` (N,) mirrored left to right.

    uint8 v becomes v / 127.5 - 1; floating images are in [-1, 1] already.
    """
    x0 = images.to(torch.float32)
    if images.dtype == torch.uint8:
        # By a tensor: on a GPU, PyTorch divides by a number as it multiplies by the rounded inverse.
        x0 = x0 / torch.full((), 127.5, device=x0.device) - 1.0
    if flip is not None:
        x0 = torch.where(flip.reshape(-1, 1, 1, 1), x0.flip(-1), x0)
    return x0


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Return x_t and eps, float32 (N, C, H, W)."""
    x0 = scale_images(a.x0, a.flip)
    if a.noise is None:
        eps = normals(math.prod(x0.shape[1:]), a.images, a.seed, a.step, STREAM_FORWARD).reshape(x0.shape)
    else:
        eps = a.noise.to(torch.float32, copy=True)
    signal, sigma = a.table[a.t].unbind(-1)
    x_t = signal.reshape(-1, 1, 1, 1) * x0 + sigma.reshape(-1, 1, 1, 1) * eps
    return x_t.contiguous(), eps.contiguous()
