"""q(x_t | x_0), equation 4 of the paper: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps."""

import math

import torch
from torch import Tensor

from ..philox import STREAM_FORWARD
from ..philox.eager import normals


def scale_images(images: Tensor, flip: Tensor | None) -> Tensor:
    """Images as float32 in [-1, 1], mirrored left to right where `flip` (N,) is true.

    uint8 v becomes v / 127.5 - 1; floats are taken as scaled already.
    """
    x0 = images.to(torch.float32)
    if images.dtype == torch.uint8:
        x0 = x0 / 127.5 - 1.0
    if flip is not None:
        x0 = torch.where(flip.reshape(-1, 1, 1, 1), x0.flip(-1), x0)
    return x0


def forward(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    flip: Tensor | None,
    noise: Tensor | None,
    images: Tensor,
    seed: Tensor,
    step: Tensor,
) -> tuple[Tensor, Tensor]:
    """x_t and eps, float32 (N, C, H, W); `table` is float32 (T, 2): sqrt(alpha_bar_t), sqrt(1 - alpha_bar_t)."""
    x0 = scale_images(x0, flip)
    if noise is None:
        eps = normals(math.prod(x0.shape[1:]), images, seed, step, STREAM_FORWARD).reshape(x0.shape)
    else:
        eps = noise.to(torch.float32, copy=True)
    signal, sigma = table[t].unbind(-1)
    x_t = signal.reshape(-1, 1, 1, 1) * x0 + sigma.reshape(-1, 1, 1, 1) * eps
    return x_t.contiguous(), eps.contiguous()
